"""The chat template: ChatML in Jinja, for engines that render text and then turn it into ids.

This package encodes a prompt segment by segment (chatml.py), so that no text becomes a control token. An engine that
tokenises the rendered text would take `<|im_end|>` in a user's message for the end of the message. The template
therefore breaks what spells a control token, `< |im_end|>`, and leaves every other `<|` alone.

Calls of tools are written in the ReAct form of tools.py, whose texts stand here because both need them.
"""

import json
import re

JSON_HINT = "Format the arguments as a JSON object."
DESCRIPTION = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {description} "
    "Parameters: {parameters}"
)
INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{descriptions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
KNOWN_ANSWER = "Thought: I now know the final answer.\nFinal Answer: {answer}"  # of a reply that called no tool


def literal(text: str) -> str:
    """Text as a string of Jinja."""
    return "'" + json.dumps(text, ensure_ascii=False)[1:-1].replace("'", "\\'") + "'"


def concatenation(text: str) -> str:
    """A text with {names} as an expression of Jinja that puts the variables' values in."""
    pieces = re.split(r"\{(\w+)\}", text)
    return " ~ ".join(piece if place % 2 else literal(piece) for place, piece in enumerate(pieces) if piece)


HEAD, HEAD_END = "{%- set default_system = ", " -%}\n"
BODY = (
    """
{#- Text in which nothing spells a control token. -#}
{%- macro plain(text) -%}
{%- set made = namespace(text=text) -%}
{%- if '<|' in text -%}
{%- for name in ['endoftext', 'im_start', 'im_end'] -%}
{%- set made.text = made.text | replace('<|' ~ name ~ '|>', '< |' ~ name ~ '|>') -%}
{%- endfor -%}
{%- endif -%}
{%- if '<|extra_' in text -%}
{%- for number in range(205) -%}
{%- set made.text = made.text | replace('<|extra_' ~ number ~ '|>', '< |extra_' ~ number ~ '|>') -%}
{%- endfor -%}
{%- endif -%}
{{- made.text -}}
{%- endmacro -%}

{#- A message's text, whether it is one text, parts or none. -#}
{%- macro text_of(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part is not string and part['text'] is not string -%}
{{- raise_exception('this model reads only text: leave out the other parts of content') -}}
{%- endif -%}
{{- part if part is string else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}

{#- The same as in training on tools: no line breaks before it, no blanks after it. -#}
{%- macro trimmed(message) -%}
{{- text_of(message).lstrip('\\n').rstrip() -}}
{%- endmacro -%}

{%- macro instruction() -%}
{%- set all = namespace(names='', descriptions='') -%}
{%- for tool in tools -%}
{%- set spec = tool['function'] or tool -%}
{%- set name = (spec['name_for_model'] or spec['name']).strip() -%}
{%- set human = spec['name_for_human'] or name -%}
{%- set description = spec['description_for_model'] or spec['description'] or '' -%}
{%- set parameters = (spec['parameters'] or {}) | tojson -%}
{%- set told = @DESCRIPTION -%}
{%- if 'Format the arguments' not in description and 'triple backticks' not in description -%}
{%- set told = told ~ ' ' ~ @JSON_HINT -%}
{%- endif -%}
{%- set all.descriptions = all.descriptions ~ ('' if loop.first else '\\n\\n') ~ told -%}
{%- set all.names = all.names ~ ('' if loop.first else ', ') ~ name -%}
{%- endfor -%}
{%- set names = all.names -%}
{%- set descriptions = all.descriptions -%}
{{- @INSTRUCTION -}}
{%- endmacro -%}

{#- The thought and the calls of messages[index], each call with its result, found by its id or by its place. -#}
{%- macro calls_of(message, calls, index) -%}
{%- set thought = trimmed(message) -%}
{{- thought if thought.startswith('Thought:') else 'Thought: ' ~ thought -}}
{%- for call in calls -%}
{%- set place = loop.index0 -%}
{%- set spec = call['function'] or call -%}
{%- set arguments = spec['arguments'] or '{}' -%}
{{- '\\nAction: ' ~ spec['name'] ~ '\\nAction Input: ' -}}
{{- arguments if arguments is string else arguments | tojson -}}
{%- set scan = namespace(on=true) -%}
{%- for result in messages[index + 1:] -%}
{%- set scan.on = scan.on and result['role'] in ['tool', 'function'] -%}
{%- set id = result['tool_call_id'] -%}
{%- if scan.on and (call['id'] == id if id else loop.index0 == place) -%}
{{- '\\nObservation: ' ~ trimmed(result) -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- endmacro -%}

{%- set tools = tools if tools is defined and tools else [] -%}
{%- set open = continue_final_message is defined and continue_final_message -%}
{%- set state = namespace(react=tools | length > 0, question=-1, ids=[], calls=0, results=0, goes_on=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set state.question = loop.index0 -%}
{%- endif -%}
{%- if message['tool_calls'] or message['function_call'] -%}
{%- set state.react = true -%}
{%- endif -%}
{%- endfor -%}
{%- if tools and state.question == -1 -%}
{{- raise_exception('tools need a question: add a message of the role user') -}}
{%- endif -%}
{%- if not messages or messages[0]['role'] not in ['system', 'developer'] -%}
{{- '<|im_start|>system\\n' ~ plain(default_system) ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set index = loop.index0 -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{%- set next_role = '' if loop.last else messages[loop.index]['role'] -%}
{%- if role in ['tool', 'function'] -%}
{%- set state.results = state.results + 1 -%}
{%- set id = message['tool_call_id'] -%}
{%- if state.results > state.calls or (id and id not in state.ids) -%}
{{- raise_exception('messages[' ~ index ~ '] is a result, but no call of the assistant before it asked for it') -}}
{%- endif -%}
{%- if next_role not in ['tool', 'function'] -%}
{%- set state.goes_on = next_role == 'assistant' -%}
{%- if loop.last and (add_generation_prompt or open) -%}
{{- '\\nThought:' -}}
{%- elif not state.goes_on -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endif -%}
{%- else -%}
{{- '\\n' if state.goes_on else '<|im_start|>' ~ plain(role) ~ '\\n' -}}
{%- set calls = message['tool_calls'] or ([message['function_call']] if message['function_call'] else []) -%}
{%- set calls = calls if role == 'assistant' else [] -%}
{%- set state.goes_on = false -%}
{%- set state.results = 0 -%}
{%- set state.calls = calls | length -%}
{%- set state.ids = [] -%}
{%- for call in calls -%}
{%- set state.ids = state.ids + [call['id']] -%}
{%- endfor -%}
{%- set answer = trimmed(message) if state.react else text_of(message) -%}
{%- if calls -%}
{{- plain(calls_of(message, calls, index)) -}}
{%- elif role == 'assistant' and tools -%}
{{- plain(@KNOWN_ANSWER) -}}
{%- elif tools and index == state.question -%}
{{- plain(instruction() ~ '\\n\\nQuestion: ' ~ answer) -}}
{%- else -%}
{{- plain(answer) -}}
{%- endif -%}
{%- if next_role not in ['tool', 'function'] and not (loop.last and open) -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not (messages and messages[-1]['role'] in ['tool', 'function']) -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".strip()
    .replace("@DESCRIPTION", concatenation(DESCRIPTION))
    .replace("@INSTRUCTION", concatenation(INSTRUCTION))
    .replace("@KNOWN_ANSWER", concatenation(KNOWN_ANSWER))
    .replace("@JSON_HINT", literal(JSON_HINT))
)


def chat_template(default_system: str) -> str:
    """The template of a checkpoint whose chats begin with `default_system` where the messages bring none."""
    return f"{HEAD}{literal(default_system)}{HEAD_END}{BODY}"


def template_system(template: str) -> str | None:
    """The default system message of a template that `chat_template` made; None if another made it."""
    begin, end = f"{HEAD}'", f"'{HEAD_END}{BODY}"
    if not (template.startswith(begin) and template.endswith(end) and len(template) >= len(begin) + len(end)):
        return None
    found = re.fullmatch(r"((?:[^'\\]|\\.)*)", template[len(begin) : -len(end)])
    try:
        return json.loads('"' + found[1].replace("\\'", "'") + '"') if found else None
    except ValueError:  # edited by hand, in Jinja's words
        return None
