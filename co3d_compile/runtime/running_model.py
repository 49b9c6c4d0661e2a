"""What runs in place of a compiled file: the same model in the layout of this machine's kernels, where that is faster.

It is made when a file is first opened on a machine, and kept (``native/form_cache.py``). Whatever goes wrong with that,
the given file itself runs, with the same numbers; a line of log says which of the two it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import Co3dError, ContractError, UsageError
from co3d_compile.native import CONVERTER
from co3d_compile.native.conversion_check import difference
from co3d_compile.native.form_cache import FormCache, cache_folder
from co3d_compile.native.running_form import RunningForm, running_form, why_plain
from co3d_compile.runtime.open_model import Provider, check_contract, open_source, session_options, stored_contract
from co3d_compile.runtime.stored_metadata import properties
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.machine import kernels

Layout: TypeAlias = Literal["auto", "plain"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
MAX_BYTES = 1 << 30  # of a file that is converted: for a moment it lies in memory several times


class _NotNow(Exception):
    """The file is not converted this time; the message says why."""


_NO_GAIN = b"no gain: "  # an entry of the cache that says why there is no other form
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """A session of ONNX Runtime, the contract of the given file, and the form in which it runs."""

    ort: ort.InferenceSession
    info: Contract
    form: RunningForm

    @property
    def layout(self) -> Literal["native", "plain"]:
        """Whether another form than the given file's runs."""
        return "plain" if self.form.contract is self.info else "native"


class Opener:
    """An opener of one model, as it is or in the form of this machine.

    Args:
        source: Its path or its bytes, with the SHA-256 of these.
        batch: The number of streams.
        layout: "auto", or "plain" for the file as it is.

    Raises:
        UsageError: Another layout.
    """

    def __init__(
        self,
        source: str | bytes,
        digest: bytes,
        providers: Sequence[Provider] | None,
        options: ort.SessionOptions,
        batch: int,
        layout: Layout,
    ) -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"layout is {layout!r}, not one of {', '.join(LAYOUTS)}.")
        self._source, self._digest, self._layout = source, digest, layout
        self._providers, self._options, self._batch = providers, options, batch
        self._name = os.path.basename(source) if isinstance(source, str) else "the model"

    def open(self) -> Running:
        """Opens the model, ready to run.

        Raises:
            LoadError, UsageError, ContractError: As ``open_source``, ``stored_contract`` and ``check_contract``.
        """
        if self._layout == "plain" or list(self._providers or ["CPUExecutionProvider"]) != ["CPUExecutionProvider"]:
            why = "layout is 'plain'" if self._layout == "plain" else "not on the CPU alone"
            return self._as_it_is(why)
        cache = FormCache(cache_folder())
        key = hashlib.sha256(f"{self._digest.hex()}; {CONVERTER}; {kernels()}".encode()).hexdigest()
        kept = self._kept(cache, key)
        if kept is not None:
            return kept
        given, info = self._given()
        why = why_plain(info)
        if why:
            return self._plain(given, info, why)
        with cache.turn(key) as own:
            return self._kept(cache, key) or self._converted(given, info, cache if own else FormCache(None), key)

    def _kept(self, cache: FormCache, key: str) -> Running | None:
        """Takes the model as the cache has it."""
        content = cache.load(key)
        if content is None:
            return None
        if content.startswith(_NO_GAIN):
            return self._as_it_is(content.removeprefix(_NO_GAIN).decode())
        try:
            return self._native(self._open(content), f"kept in {cache.folder}")
        except Co3dError as error:
            log.info("%s: what is kept of it does not open: %s", self._name, error)
            return None

    def _converted(self, given: ort.InferenceSession, info: Contract, cache: FormCache, key: str) -> Running:
        """Converts the model, checks it and puts it into the cache.

        Returns the given one where that comes to nothing.
        """
        try:
            from co3d_compile.native.conversion import NothingGained, convert
        except ImportError as error:
            hint = install_command("co3d-compile[native]")
            return self._plain(given, info, f"{error.name} is not installed ({hint})")
        start = time.perf_counter()
        try:
            content = convert(self._content(), info)
            converted = self._open(content)
            wrong = self._difference(given, info, content, converted)
        except NothingGained as error:
            cache.store(key, _NO_GAIN + str(error).encode())
            return self._plain(given, info, str(error))
        except (_NotNow, OSError, MemoryError) as error:
            return self._plain(given, info, str(error) or "there is no memory to convert it")
        except Exception as error:  # the file itself is as good as before
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        if wrong:
            log.warning("%s cannot be run in this machine's layout (%s): it runs as it is", self._name, wrong)
            cache.store(key, _NO_GAIN + b"its conversion failed before")
            return self._plain(given, info, "its conversion failed")
        seconds = time.perf_counter() - start
        problem = cache.store(key, content)
        kept = f"not kept: {problem}" if problem else f"kept in {cache.folder}"
        return self._native(converted, f"converted in {seconds:.1f} s, {kept}")

    def _content(self) -> bytes:
        """The bytes whose digest is known."""
        if isinstance(self._source, bytes):
            return self._source
        if os.path.getsize(self._source) > MAX_BYTES:
            raise _NotNow("it is too large to be converted")
        content = Path(self._source).read_bytes()
        if hashlib.sha256(content).digest() != self._digest:
            raise _NotNow("the file was changed meanwhile")
        return content

    def _difference(
        self, given: ort.InferenceSession, info: Contract, content: bytes, converted: ort.InferenceSession
    ) -> str:
        """Says how the converted file's results differ, if they do."""
        if self._options.enable_profiling:  # these steps are none of the user's
            options = session_options(self._options.intra_op_num_threads)
            given, converted = (open_source(file, None, options) for file in (self._source, content))
        where = difference(given, converted, info, _form_of(converted))
        return where and f"its results would differ at {where}"

    def _open(self, source: str | bytes) -> ort.InferenceSession:
        return open_source(source, self._providers, self._options)

    def _as_it_is(self, why: str) -> Running:
        return self._plain(*self._given(), why)

    def _given(self) -> tuple[ort.InferenceSession, Contract]:
        session = self._open(self._source)
        info = stored_contract(session)
        check_contract(session, info, self._batch)
        return session, info

    def _plain(self, session: ort.InferenceSession, info: Contract, why: str) -> Running:
        log.info("%s runs as it is: %s", self._name, why)
        return Running(session, info, RunningForm(info))

    def _native(self, session: ort.InferenceSession, how: str) -> Running:
        form = _form_of(session)
        check_contract(session, form.contract, self._batch)
        log.info("%s runs in this machine's layout: %s", self._name, how)
        return Running(session, stored_contract(session), form)


def _form_of(session: ort.InferenceSession) -> RunningForm:
    form = running_form(properties(session))
    if form is None:
        raise ContractError("The file was not converted.")
    return form
