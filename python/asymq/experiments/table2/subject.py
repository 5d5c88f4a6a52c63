"""A model of Table 2 with the text that it learns from and is evaluated on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.files import BadInput, first_line, sha256
from asymq.experiments.table2.protocol import Protocol


@dataclass
class Subject:
    """A model with the text it learns from and is evaluated on, as windows [n, context]."""

    name: str  # what transformers loads
    train: Tensor
    test: Tensor
    settings: dict  # what the results depend on: the protocol, the texts, the model's files

    @property
    def label(self) -> str:
        return label_of(self.name)

    def load(self) -> nn.Module:
        """The float model in float32, dropout off."""
        from transformers import AutoModelForCausalLM

        complaint = "its weights do not load"
        return _loaded(AutoModelForCausalLM, self.name, complaint, dtype=torch.float32).eval()


def label_of(name: str) -> str:
    """How results call a model: the last part of its name or folder."""
    return Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]


def open_subject(name: str, train: text.Text, test: text.Text, protocol: Protocol) -> Subject:
    """Reads everything of a model but its weights, and tokenizes the texts.

    BadInput: no such model, not a family that asymq quantizes at every site, a context longer than
    the model's, a text shorter than a window.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name)
    files = _files(folder) if folder.is_dir() else []
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise BadInput(
            f"{name}: no such folder; give one with config, weights and tokenizer, or a name of "
            "the hub"
        )
    config = _loaded(AutoConfig, name, "no model's folder or name of the hub")
    _need_preparable(name, config, protocol)
    context = _context(name, config, protocol)
    tokenizer = _loaded(AutoTokenizer, name, "its tokenizer does not load")
    ids = {
        "train": text.tokenize(tokenizer, train.content),
        "test": text.tokenize(tokenizer, test.content, protocol.perplexity == "run_clm"),
    }
    for tokens in ids.values():
        if len(tokens) and int(tokens.max()) >= config.vocab_size:
            raise BadInput(
                f"{name}: its tokenizer has more tokens than the model ({config.vocab_size}); they "
                "do not belong together"
            )
    settings = {
        **asdict(protocol),
        "context": context,
        "train_text": train.source,
        "train_text_sha256": train.sha256,
        "test_text": test.source,
        "test_text_sha256": test.sha256,
        "model_sha256": {file.name: sha256(file) for file in files},
    }
    return Subject(
        name,
        text.windows(ids["train"], context, train.source),
        text.windows(ids["test"], context, test.source),
        settings,
    )


def _loaded(kind, name: str, complaint: str, **options):
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:
        raise BadInput(f"{name}: {complaint}: {first_line(error)}") from None


def _files(folder: Path) -> list[Path]:
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not (folder / "config.json").exists() or not weights:
        raise BadInput(
            f"{folder}: needs config.json and model.safetensors; give a folder that "
            "save_pretrained has written"
        )
    return [folder / "config.json", *weights]


def _need_preparable(name: str, config, protocol: Protocol) -> None:
    """Prepares the model without its weights."""
    from transformers import AutoModelForCausalLM

    family = config.model_type
    if family == "generic" or not find_spec(f"asymq.models.{family}"):
        raise BadInput(f"{name}: is a {family!r} model; Table 2 is about GPT-2 and OPT")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        asymq.prepare(model, protocol.config("min_max"))
    except ValueError as error:
        raise BadInput(f"{name}{_granularities(protocol)}: {first_line(error)}") from None


def _granularities(protocol: Protocol) -> str:
    """The options that a model's shapes may not allow, as far as they are given."""
    given = [
        f"--{which}-granularity {value}"
        for which in ("weight", "activation")
        if (value := getattr(protocol, f"{which}_granularity"))
        != getattr(Protocol, f"{which}_granularity")
    ]
    return f" with {' '.join(given)}" if given else ""


def _context(name: str, config, protocol: Protocol) -> int:
    longest = config.max_position_embeddings
    context = protocol.context or min(longest, _default_context(config))
    if not 2 <= context <= longest:
        raise BadInput(f"{name}: --context must be 2 to {longest}, the model's, got {context}")
    return context


def _default_context(config) -> int:
    xl = config.model_type == "gpt2" and config.hidden_size == 1600
    return 768 if xl else 1024
