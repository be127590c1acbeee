"""Atomic writes, safetensors files with checksums, and JSON that may be damaged."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from types import CodeType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

if sys.platform != "win32":  # on Windows, abandoned temporary files stay
    import fcntl

HEADER, _CHECKSUM = "lowrank_ops", "lowrank_ops.sha256"  # of safetensors metadata
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip

_PLAIN = (torch.dtype, torch.device, torch.layout, range, slice, PurePath)  # whose repr says all


@contextmanager
def replacing(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Open a temporary file beside each path; they replace the paths, in order, if the block ends without an exception.

    Files and folder are flushed to the disk. A replaced file keeps its mode, a new one has the mode of the umask. On an
    exception the temporary files are removed; those of killed processes are removed by the next call for their path.

    Raises:
        OSError: a file cannot be written; the old files are unchanged.
    """
    with ExitStack() as stack:
        temporary = [stack.enter_context(_temporary(path)) for path in paths]
        files = [file for file, _ in temporary]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":  # cannot replace open files
                file.close()
        for path, (_, name) in zip(paths, temporary, strict=True):
            os.replace(name, path)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Create the folder for the block; after an exception, remove it if it was created here and is empty."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_whole(path: str | Path, content: bytes) -> None:
    """Replace a file, or create it; errors as for :func:`replacing`."""
    with replacing(Path(path)) as (file,):
        file.write(content)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is a folder or device, not a file that can be replaced.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is in a folder that does not exist; create it first.")
    _remove_abandoned(path)
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process has removed it before it was locked
    try:
        if path.exists():
            os.chmod(name, path.stat().st_mode & 0o777)
        yield file, name
    finally:
        with contextlib.suppress(OSError):  # what could not be written fails again in close
            file.close()
        name.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files for ``path`` that no living process has locked."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            ours = other.name.startswith(f".{path.name}.") and other.name.endswith(".tmp")
            if ours and other.is_file() and not other.is_symlink():
                with contextlib.suppress(OSError), other.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    other.unlink()


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(argument: str, path: Path) -> None:
    """Raise ValueError, before long work, for a path that cannot be written later."""
    if path.is_dir():
        raise ValueError(f"{argument} {str(path)!r} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{argument} {str(path)!r} is in a folder that does not exist; create it first.")


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file whose metadata holds ``header`` as JSON, with a checksum of that JSON.

    The library's own function writes to a path of its own choice, with mode 0600, and hides the cause of an OSError.

    Raises:
        ValueError: a tensor of a dtype that safetensors does not have.
    """
    head, places = _head(tensors, header)
    file.write(head)
    for name in places:
        file.write(_bytes(tensors[name]))


def write_stream(
    file: BinaryIO,
    forms: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    header: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file of tensors that exist one after another.

    Args:
        file: empty.
        forms: tensors on the meta device, with the names, shapes and dtypes.
        tensors: names and tensors, in any order.
        header: as for :func:`write_tensors`; "checksums" are added here. None writes a file as other tools do.

    Returns:
        The header with its checksums; empty without a header.
    """
    checksums = dict.fromkeys(forms, "0" * 64)
    whole = None if header is None else {**header, "checksums": checksums}
    head, places = _head(forms, whole)
    source, left = iter(tensors), set(forms)
    while left:
        name, tensor = next(source)
        left.remove(name)
        assert (tensor.shape, tensor.dtype) == (forms[name].shape, forms[name].dtype), name
        if whole is not None:
            checksums[name] = digest(tensor)
        file.seek(len(head) + places[name])
        file.write(_bytes(tensor))
        del tensor  # before the next one is computed
    file.seek(0)
    file.write(_head(forms, whole)[0])  # as long as before
    return whole or {}


def _head(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None) -> tuple[bytes, dict[str, int]]:
    """The head of a file, and where the bytes of each tensor begin behind it, in ascending order."""
    metadata = {"format": "pt"}
    if header is not None:
        text = json.dumps(header)
        metadata |= {HEADER: text, _CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end, places = 0, {}
    # Wide dtypes first, which aligns every tensor.
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {tensor.dtype}, which safetensors files cannot hold.")
        places[name], end = end, end + tensor.numel() * tensor.dtype.itemsize
        offsets = [places[name], end]
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, places


def read_header(file: Any, *, verify: bool = True) -> dict[str, Any]:
    """The header of an open safetensors file that :func:`write_tensors` or an earlier version wrote.

    Raises:
        ValueError: there is none, or it differs from its checksum.
    """
    metadata = file.metadata() or {}
    if HEADER not in metadata:
        raise ValueError("its header has no entry 'lowrank_ops'")
    text = metadata[HEADER]
    if verify and _CHECKSUM in metadata and hashlib.sha256(text.encode()).hexdigest() != metadata[_CHECKSUM]:
        raise ValueError("its header differs from the checksum of the header")
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    return header


def form_of(file: Any, name: str) -> Tensor:
    """A tensor of an open safetensors file without its values, on the meta device.

    Raises:
        ValueError: a dtype that torch does not have.
    """
    part = file.get_slice(name)
    dtype = next((dtype for dtype, found in _DTYPES.items() if found == part.get_dtype()), None)
    if dtype is None:
        raise ValueError(f"{name!r} has dtype {part.get_dtype()}, which is not supported")
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def read_tensor(file: Any, name: str, checksums: Mapping[str, str] | None) -> Tensor:
    """A tensor of an open safetensors file, compared with its checksum unless ``checksums`` is None.

    Raises:
        ValueError: they differ.
    """
    tensor = file.get_tensor(name)
    if checksums is not None and checksums.get(name) != digest(tensor):
        raise ValueError(f"the values of {name!r} differ from their checksum")
    return tensor


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file. Any error in the block that the file may cause is a ValueError.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the reason, to be put after the name of the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


@contextmanager
def open_checkpoint(path: Path, form: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The header and the tensors of a checkpoint. Any error in the block that the file may cause is a ValueError.

    Raises:
        ValueError: the file cannot be read, or its format is not ``form``.
    """
    try:
        with open_tensors(path) as file:
            header = read_header(file)
            if header.get("format") != form:
                raise ValueError(f"its format is {header.get('format')!r}, not {form!r}")
            checksums = dict(header["checksums"])
            yield header, {name: read_tensor(file, name, checksums) for name in checksums}
    except (ValueError, OSError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read: {error}. Delete it to start again, or pass another path."
        ) from None


def digest(value: Any) -> str:
    """SHA-256 of a value: of dtypes, shapes and bytes of tensors and arrays, nested in mappings, sequences and objects.

    Tensors on ``meta`` have no bytes. Functions are identified by their names, their code, and the numbers and strings
    that they read from their closure, their globals and the object they belong to; types by their names. A module, such
    as a loss, also counts with its own constants, parameters and buffers.
    """
    found = hashlib.sha256()
    _update(found, value, [])
    return found.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``{name: digest}``, the checksums of a header."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def _update(found: Any, value: Any, parents: Sequence[int]) -> None:
    inner = [*parents, id(value)]
    if isinstance(value, Tensor):
        found.update(f"tensor {tuple(value.shape)} {value.dtype} ".encode())
        found.update(b"" if value.is_meta else _bytes(value))
    elif isinstance(value, (str, bytes, int, float, complex, type(None), *_PLAIN)):
        found.update(f"{value!r} ".encode())
    elif id(value) in parents:
        found.update(b"cycle ")
    elif isinstance(value, (Mapping, tuple, list)):
        parts = [part for item in value.items() for part in item] if isinstance(value, Mapping) else value
        found.update(f"{len(parts)} parts ".encode())
        for part in parts:
            _update(found, part, inner)
    elif hasattr(value, "tobytes") and not isinstance(value, type):  # an array
        found.update(f"array {getattr(value, 'shape', None)} {getattr(value, 'dtype', None)} ".encode())
        found.update(value.tobytes())
    elif isinstance(value, (set, frozenset)):
        _update(found, sorted(map(digest, value)), inner)
    elif isinstance(value, functools.partial):
        _update(found, [value.func, value.args, value.keywords], inner)
    elif callable(value) or not _attributes(value):
        found.update(f"{getattr(value, '__qualname__', type(value).__qualname__)} ".encode())
        if not isinstance(value, type):
            if isinstance(value, nn.Module):
                constants = {name: getattr(value, name, None) for name in getattr(value, "__constants__", ())}
                _update(found, [constants, value._parameters, value._buffers], inner)
            function = _function_of(value)
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                found.update(_code_of(code).encode())
                wrapped = getattr(function, "__wrapped__", None)
                parts = [function.__defaults__, function.__kwdefaults__, wrapped, _read_by(value, function)]
                _update(found, parts, inner)
    else:
        _update(found, _attributes(value), inner)


def _attributes(value: Any) -> dict[str, Any]:
    """Of an object, also those in slots."""
    slots = [kind.__dict__.get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some) if name[:2] != "__"]
    return {name: getattr(value, name, None) for name in names} | dict(getattr(value, "__dict__", {}))


def _read_by(value: Any, function: Any) -> list[dict[str, Any]]:
    """The numbers and strings that a function reads from closure, globals and its object, unless it changes them."""
    codes = [function.__code__]
    for code in codes:  # and those inside it, such as comprehensions
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    stores = ("STORE_DEREF", "STORE_GLOBAL", "STORE_ATTR")
    changed = {step.argval for code in codes for step in dis.get_instructions(code) if step.opname in stores}
    names = sorted({name for code in codes for name in code.co_names} - changed - {"training"})
    captured = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is empty
            captured[name] = cell.cell_contents
    own = _attributes(getattr(value, "__self__", value))
    plain = (int, float, complex, str, bytes)
    return [
        {name: found[name] for name in read if isinstance(found.get(name), plain)}
        for read, found in ((sorted(captured.keys() - changed), captured), (names, function.__globals__), (names, own))
    ]


def _function_of(value: Any) -> Any:
    """What runs when ``value`` is called."""
    if hasattr(value, "__code__") or hasattr(value, "__func__"):
        return value
    return getattr(type(value), "forward", type(value).__call__)


def _code_of(code: CodeType) -> str:
    consts = (
        _code_of(const) if isinstance(const, CodeType)
        else sorted(map(repr, const)) if isinstance(const, frozenset)
        else repr(const)
        for const in code.co_consts
    )  # fmt: skip
    return f"{code.co_code.hex()} {code.co_names} {list(consts)}"


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def parse_json(text: str | bytes) -> Any:
    """``json.loads``; every failure is a ValueError.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are subclasses
        raise ValueError(f"it is not JSON: {error}") from None
