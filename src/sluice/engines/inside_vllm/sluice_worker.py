"""What sluice adds to vLLM's worker processes: loading published weights, and reading back those that they compute with.

It runs in vLLM's own environment, which has no sluice: the folder of this file is put on its `PYTHONPATH`, and vLLM is started
with `--worker-extension-cls sluice_worker.Weights`. Its methods are called through `/collective_rpc`.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def _find_sluice() -> None:
    """Whatever needs torch only can be imported from there: nothing else that lies beside it is seen here."""
    package = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "sluice", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec
    assert spec.loader
    module = sys.modules["sluice"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_find_sluice()

from sluice.engines.vllm_tensors import (  # noqa: E402
    adapter_tensors,
    checkpoint_tensors,
    is_head,
    misfit,
    packing_kernel,
    shapes_of,
)
from sluice.errors import EngineError, SluiceError  # noqa: E402
from sluice.weights.fingerprint import parts  # noqa: E402
from sluice.weights.publication import Source  # noqa: E402


class Weights:
    """Becomes a base of vLLM's worker class. What its methods give is told as `_outcome` says."""

    _source: Source | None = None
    _fitting: Any = None
    """Names and shapes of those that it took last."""

    def sluice_ready(self) -> dict[str, Any]:
        """How many workers tensor parallelism makes, and whether these are all."""
        return _outcome(self._layout)

    def sluice_load(self, inlet: str, version: str, asked: str) -> dict[str, Any]:
        """Take over the weights of a version, which come through a `sluice.weights.publication.Stream`, pickled. Gives the parts of the
        fingerprint of what came, if it is `asked` for them."""
        return _outcome(lambda: self._load(inlet, int(version), asked == "parts"))

    def sluice_adapters(self) -> dict[str, Any]:
        """The numbers of those that it has."""
        return _outcome(lambda: sorted(self._adapters().list_adapters()))

    def sluice_load_adapter(self, folder: str, number: str) -> dict[str, Any]:
        """Put the adapter of a folder in the place of the one of this number; False if it has none."""
        return _outcome(lambda: self._load_adapter(folder, int(number)))

    def sluice_parts(self, adapter: str) -> dict[str, Any]:
        """The parts of the fingerprint that this rank has, under the names of the checkpoint, with those of the adapter of that number
        if there is one. With tensor parallelism the sums of the ranks are to be added."""
        return _outcome(lambda: self._parts(int(adapter) if adapter else None))

    def sluice_shapes(self) -> dict[str, Any]:
        """Of the weights that it wants to be given, and the highest rank of an adapter that it takes (0: none at all)."""
        return _outcome(self._shapes)

    def _layout(self) -> list[Any]:
        parallel: Any = self.parallel_config  # type: ignore[attr-defined]
        is_plain = parallel.pipeline_parallel_size == parallel.data_parallel_size == 1
        return [parallel.tensor_parallel_size, is_plain]

    def _shapes(self) -> list[Any]:
        lora: Any = self.model_runner.lora_config  # type: ignore[attr-defined]
        return [shapes_of(self.model_runner.get_model()), lora.max_lora_rank if lora else 0]  # type: ignore[attr-defined]

    def _adapters(self) -> Any:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if not runner.lora_config:
            raise EngineError("the server takes no adapters; start it with --enable-lora --max-lora-rank RANK")
        return runner.lora_manager

    def _load_adapter(self, folder: str, number: int) -> bool:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        manager = self._adapters()
        if number not in manager.list_adapters():
            return False
        manager.add_adapter(LoRARequest("adapter", number, folder, load_inplace=True))
        return True

    def _load(self, inlet: str, version: int, wants_parts: bool) -> list[Any]:
        source = self._source = self._source or Source()
        stream = source.inlet(inlet)
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        model, came = runner.get_model(), list[Any]()

        def noted(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for pair in weights:
                if wants_parts:
                    came.extend(parts([pair]))
                yield pair

        other = ""
        try:
            shapes = list(stream.shapes(version))
            if shapes != self._fitting and runner.vllm_config.quant_config is None:  # else it has tensors of its own
                other, is_certain = misfit(shapes_of(model), shapes)
                if is_certain:
                    raise EngineError(other)
            with _whole_again(model, runner.model_config, other):
                weights = stream.tensors(version, runner.device, _rank())
                runner.reload_weights(weights_iterator=noted(weights))
        except BaseException:
            source.drop()
            raise
        self._fitting = shapes
        _pack(model)
        return came

    def _parts(self, adapter: int | None) -> list[Any]:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        own = checkpoint_tensors(runner.get_model(), _rank())
        if adapter is not None:
            own = chain(own, adapter_tensors(self._adapters()._adapter_manager, adapter, _rank()))
        found: list[Any] = []
        for name, tensor, shape in own:
            ((name, _, dtype, total),) = parts([(name, tensor)])
            found.append([name, shape, dtype, total])
        return found


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """Its value, or its error as text: of errors that are raised vLLM tells the first worker's, and takes the others' for answers to what it
    asks next."""
    try:
        return {"value": work()}
    except Exception as error:
        traceback.print_exc()
        return {"error": _told(error)}


def _told(error: Exception) -> str:
    """With its kind, and its place where it says nothing else."""
    if isinstance(error, SluiceError):
        return str(error)
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error) or f'{at.line} ({at.filename}:{at.lineno})'}"


@contextmanager
def _whole_again(model: nn.Module, config: Any, other: str) -> Generator[None]:
    """Around a load, which vLLM does layer by layer: should it break off, it would go on with what it has kept of it in the next one. What is
    not loaded is as before then. `other`: in what the weights may be another model's."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # pyright: ignore[reportMissingImports]

    try:
        yield
    except BaseException as error:
        for module in model.modules():
            info: Any = get_layerwise_info(module)
            info.loaded_weights.clear()
            info.load_numel = 0
        finalize_layerwise_reload(model, config)
        if other and isinstance(error, Exception) and not isinstance(error, SluiceError):
            raise EngineError(f"{other} ({_told(error)})") from error
        raise


def _pack(model: nn.Module) -> None:
    """For a CPU's kernels, what vLLM packs when it has the first weights and not again: experts, and a head that has the matrix of
    the embeddings. One of its own, which it does pack, is not told from that and packed twice."""
    module: Any
    for module in model.modules():
        if kernel := packing_kernel(module):
            kernel.process_weights_after_loading(module)
        elif is_head(module) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _rank() -> int:
    """Of the tensor parallelism."""
    from vllm.distributed import get_tensor_model_parallel_rank  # pyright: ignore[reportMissingImports]

    return get_tensor_model_parallel_rank()
