"""Put the model's code beside its weights, so that plain transformers loads them with `trust_remote_code=True`."""

import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModel": "modeling_qwen.QWenModel",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        "AutoModelForSequenceClassification": "classification.QWenForSequenceClassification",
        "AutoModelForTokenClassification": "classification.QWenForTokenClassification",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


def push_code_to(directory: str | os.PathLike) -> None:
    """Copy the modules that model and tokenizer import and name them in the settings files that are there.

    Within this project the copies are never run: the installed package wins.
    """
    here = Path(__file__).parent
    for entry in (here / "modeling_qwen.py", here / "classification.py", here / "tokenization_qwen.py"):
        for module in (str(entry), *get_relative_import_files(str(entry))):
            shutil.copy(module, directory)
    for name, auto_map in AUTO_MAPS.items():
        path = Path(directory) / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["auto_map"] = auto_map
            if name == "config.json" and (ends := reply_ends(Path(directory) / "generation_config.json")):
                settings["eos_token_id"] = ends[0]  # the one that llama.cpp's converter reads, and it reads it here
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def reply_ends(path: Path) -> list[int]:
    """The ids that end a reply by a generation_config.json, the most usual first."""
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
