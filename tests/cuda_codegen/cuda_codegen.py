"""Inductor's CUDA code for a function, generated on a machine without a GPU.

Registers a device guard and hooks that do nothing (noop_cuda.cpp), tells torch and Triton that an H200
is present, and lets Inductor generate its Triton code from fake tensors. Kernels are generated, never
run: launches, partitions, devices and mutated buffers can be counted; nothing can be said about speed.

Import this module before torch, in a process of its own: the patches are global.
Needs torch 2.13 (CPU wheel), triton 3.7.1 from PyPI, and g++.

    import cuda_codegen                       # first
    import torch
    graphs = cuda_codegen.capture(function, make_arguments, options={...}, backward=True)
    for g in graphs: print(g.is_backward, len(g.launches), g.partitions, g.devices, g.source)
"""

import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types

assert "torch" not in sys.modules, "import cuda_codegen before torch"


def _build_shim() -> str:
    source = pathlib.Path(__file__).with_name("noop_cuda.cpp")
    torch_dir = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256(source.read_bytes() + str(torch_dir).encode()).hexdigest()[:16]
    library = pathlib.Path(tempfile.gettempdir()) / f"libnoop_cuda-{key}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                "g++",
                "-O1",
                "-std=c++20",
                "-shared",
                "-fPIC",
                str(source),
                "-o",
                str(partial),
                f"-I{torch_dir}/include",
                f"-I{torch_dir}/include/torch/csrc/api/include",
                f"-L{torch_dir}/lib",
                "-lc10",
                "-ltorch_cpu",
                f"-Wl,-rpath,{torch_dir}/lib",
            ],
            check=True,
        )
        partial.rename(library)
    return str(library)


_shim = ctypes.CDLL(_build_shim(), mode=ctypes.RTLD_GLOBAL)
import torch  # noqa: E402  (the hooks must be registered first)
import torch.cuda  # noqa: E402

assert _shim.install_noop_cuda_guard() == 3

_H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=150 * 2**30,
    gcnArchName="",
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    uuid="0",
    is_integrated=0,
)


def _constant(value):
    return lambda *args, **kwargs: value


def _pretend() -> None:
    # One function object an attribute: Dynamo keeps a rule for each and refuses one with two rules.
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_properties": _H200,
        "get_device_capability": (9, 0),
        "get_device_name": _H200.name,
        "synchronize": None,
        "_lazy_init": None,
        "set_rng_state": None,
    }.items():
        setattr(torch.cuda, name, _constant(value))
    torch.cuda.get_rng_state = lambda *a, **k: torch.zeros(16, dtype=torch.uint8, device="cpu")
    for name in ("_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, _constant(0))
    torch._C._cuda_cudaCachingAllocator_is_enabled = _constant(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.version.cuda = "13.0"

    from torch._dynamo.device_interface import CudaInterface

    for name, value in {
        "get_device_properties": _H200,
        "current_device": 0,
        "device_count": 1,
        "get_compute_capability": 90,
        "synchronize": None,
        "is_bf16_supported": True,
        "get_raw_stream": 0,
    }.items():
        setattr(CudaInterface, name, staticmethod(_constant(value)))
    CudaInterface.Worker.current_device = staticmethod(_constant(0))
    CudaInterface.Worker.get_device_properties = staticmethod(_constant(_H200))

    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm

    inductor_config.compile_threads = 1
    inductor_config.fx_graph_cache = False
    inductor_config.joint_graph_constant_folding = False
    functorch_config.enable_autograd_cache = False
    fuse_attention._sfdp_init = _constant(None)
    pad_mm._pad_mm_init = _constant(None)
    misc_patterns._misc_patterns_init = _constant(None)

    import triton
    from torch._inductor.async_compile import AsyncCompile
    from triton.backends.compiler import GPUTarget

    class Driver:
        class utils:  # noqa: N801  (Triton's name)
            get_device_properties = staticmethod(_constant({"max_shared_mem": 232448, "multiprocessor_count": 132}))

        get_current_target = _constant(GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = _constant(0)
        get_active_torch_device = _constant(torch.device("cuda", 0))

    class Kernel:
        def __getattr__(self, name):
            return _constant(None)

    triton.runtime.driver.set_active(Driver())
    AsyncCompile.triton = _constant(Kernel())
    AsyncCompile.warm_pool = classmethod(_constant(None))


_pretend()

import torch._inductor.compile_fx as compile_fx  # noqa: E402
from torch._inductor import config, metrics  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402


@dataclasses.dataclass
class Graph:
    """One generated graph, forward or backward."""

    is_backward: bool
    source: str = ""  # Python wrapper and Triton kernels
    devices: tuple[str, ...] = ()
    mutated: frozenset[int] = frozenset()
    static: frozenset[int] = frozenset()
    partitions: int = 0  # CUDA graphs that it would be captured as (with triton.cudagraphs)

    @property
    def launches(self) -> list[str]:
        """Kernels and library calls that one run launches, in order."""
        return re.findall(r"^\s+(\w+)\.run\(", self.source, re.M) + re.findall(
            r"^\s+(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", self.source, re.M
        )

    @property
    def is_one_cuda_graph(self) -> bool:
        """Whether everything lies in one capture: one partition, no CPU work, no host read, static mutation only."""
        return (
            self.partitions == 1
            and set(self.devices) == {"cuda:0"}
            and ".item()" not in self.source
            and "cpp_fused" not in self.source
            and self.mutated <= self.static
        )


def capture(function, make_arguments, *, options=None, backward=True, dynamic=False) -> list[Graph]:
    """Generates the CUDA code of `function(*make_arguments("cuda"))`.

    `make_arguments` is called with the device inside a fake-tensor mode; a module among the arguments or
    closed over must be made there too. With `backward`, the result (or its first element) is differentiated.
    `options` are Inductor options, with `triton.cudagraphs` on unless given.
    """
    graphs: list[Graph] = []
    torch._dynamo.reset()
    metrics.reset()
    original = GraphLowering.codegen

    def inner(gm, example_inputs, **kwargs):
        graph = Graph(bool(kwargs.get("is_backward", False)), static=frozenset(kwargs.get("static_input_idxs", ())))

        def codegen(lowering, *args, **kw):
            result = original(lowering, *args, **kw)
            graph.source = getattr(result[0], "value", str(result[0]))
            graph.devices = tuple(sorted(str(d) for d in lowering.device_node_mapping))
            graph.mutated = frozenset(lowering.mutated_input_idxs)
            return result

        GraphLowering.codegen = codegen
        try:
            compiled = compile_fx.compile_fx_inner(gm, example_inputs, **kwargs)
        finally:
            GraphLowering.codegen = original
        graph.partitions = len(getattr(compiled, "partition_maps", None) or [])
        graphs.append(graph)

        def run(args):
            args = list(args) if not isinstance(args, list) else args
            values = list(args)
            args.clear()
            with torch.no_grad():
                return torch.fx.Interpreter(gm).run(*values)

        run._boxed_call = True
        return run

    def backend(gm, example_inputs, **kwargs):
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=inner)

    with config.patch({"triton.cudagraphs": True, **(options or {})}), FakeTensorMode(allow_non_fake_inputs=True):
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*make_arguments("cuda"))
        if backward:
            (result[0] if isinstance(result, (tuple, list)) else result).backward()
    return graphs
