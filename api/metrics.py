"""What the server counts, in Prometheus' form, at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qwen.engine import Observer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Observer):
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("qwen_requests", "Requests answered", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("qwen_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter("qwen_cached_tokens", "Tokens of prompts known already", registry=registry)
        self.completion_tokens = Counter("qwen_completion_tokens", "Tokens written", registry=registry)
        self.steps = Counter("qwen_steps", "Steps, each for all running requests", registry=registry)
        self.running = Gauge("qwen_running", "Replies being written", registry=registry)
        self.waiting = Gauge("qwen_waiting", "Replies waiting", registry=registry)
        self.kv_tokens = Gauge("qwen_kv_tokens", "Tokens whose keys and values are in memory", registry=registry)
        self.first_token = Histogram(
            "qwen_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            "qwen_between_tokens_seconds", "From token to token of a reply", buckets=SECONDS, registry=registry
        )
        self.seconds = Histogram(
            "qwen_request_seconds", "From a request to its last token", buckets=SECONDS, registry=registry
        )

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)

    def chose(self, is_first: bool, seconds: float) -> None:
        (self.first_token if is_first else self.between_tokens).observe(seconds)
        self.completion_tokens.inc()

    def stepped(self) -> None:
        self.steps.inc()

    def ended(self, seconds: float) -> None:
        self.seconds.observe(seconds)

    def counted(self, running: int, waiting: int, kv_tokens: int) -> None:
        self.running.set(running)
        self.waiting.set(waiting)
        self.kv_tokens.set(kv_tokens)

    def render(self) -> bytes:
        return generate_latest(self.registry)
