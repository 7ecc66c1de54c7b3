"""A device that is not there: it computes on the CPU, and is held to the rules of CUDA, or of Apple's MPS.

    python tests/stand_in.py mps '[["train.py", "fit", "--config", "tests/tiny.yaml"], ["sample.py", "7"]]'

runs the commands one after another with the device as the machine's accelerator, and prints what they did against the rules,
and how often each training step made the host wait. Its tensors are shells around tensors of the CPU: every operation passes
through `Machine.run`, which looks at it, computes it, and wraps what comes out. Values are right, and speed says nothing.

It does not see what autocast, `torch.compile` and forward differentiation do on such a device.
"""

import collections
import contextlib
import functools
import json
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path

import lightning.fabric.accelerators.mps
import lightning.pytorch.accelerators.mps
import torch
import torchgen
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

ROOT = Path(__file__).resolve().parent.parent
HERE = torch.device("cpu")

TRANSFERS = ("copy_", "_to_copy")
"""What carries values from one device to another."""

TAKES_BOTH = (*TRANSFERS, "index.Tensor", "index_put_", "_index_put_impl_", "_fused_adamw_")
"""What may be given tensors of both devices: transfers, indices on the CPU, an optimizer's counts."""

BETWEEN = ("stand_in.py", "_python_dispatch.py", "eval_frame.py")
"""Files that stand on the stack between an operation and who asked for it."""

READS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "is_nonzero")
"""What hands values, or a shape that depends on them, to the host."""


class Kernels:
    """Which operations a device has kernels for, by PyTorch's own table of them."""

    def __init__(self, rules: str) -> None:
        folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
        table = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
        self.index = table.backend_indices[DispatchKey.parse(rules.upper())]
        self.functions = {str(function.func.name): function for function in table.native_functions}

    def has(self, name: str) -> bool:
        """Whether there is a kernel, or a definition by operations that have one."""
        function = self.functions.get(name)
        if function is None:
            return True  # no operation of PyTorch's own
        if self.index.has_kernel(function) or function.has_composite_kernel:
            return True
        return bool(function.structured_delegate) and self.has(str(function.structured_delegate))


class Machine:
    """Runs operations, and notes what is against the rules, and what makes the host wait.

    Args:
        rules: cuda or mps.
    """

    def __init__(self, rules: str) -> None:
        self.rules, self.kernels = rules, Kernels(rules)
        self.faults: dict[str, str] = {}
        self.waits: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
        self.step = 0  # of the training; 0 outside of it
        self.seeded_on: dict[int, str] = {}

    def fault(self, what: str) -> None:
        where = place()
        self.faults.setdefault(f"{what}, {where}", where)

    def wait(self, what: str) -> None:
        self.waits[self.step][f"{what}, {place()}"] += 1

    def waited(self) -> int:
        """How often the host has waited so far."""
        return sum(sum(counts.values()) for counts in self.waits.values())

    def run(self, func, args, kwargs):
        """Compute an operation of PyTorch's."""
        name = str(func).removeprefix("aten.").removesuffix(".default")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        away, near = [t for t in given if isinstance(t, Shell)], [t for t in given if not isinstance(t, Shell)]
        wanted = kwargs.get("device")
        if wanted is not None:
            lands_away = torch.device(wanted).type != "cpu"
        else:
            lands_away = isinstance(args[0], Shell) if name == "copy_" else bool(away)
        if not away and not lands_away:
            return func(*args, **kwargs)
        self.look(name, away, near, lands_away, kwargs)
        # The operation itself, on the CPU.
        inner = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Shell) else leaf, (args, kwargs))
        options = {key: HERE if key == "device" and value is not None else value for key, value in inner[1].items()}
        options.pop("pin_memory", None)
        out = func(*inner[0], **options)
        # What was changed in place stays the tensor that it was.
        known = {id(t.inner if isinstance(t, Shell) else t): t for t in given}
        return tree_map(lambda leaf: self.wrap(leaf, known, lands_away), out)

    def look(self, name, away, near, lands_away, kwargs) -> None:
        """Hold an operation to the rules."""
        if away and name not in TAKES_BOTH and any(t.dim() for t in near):
            self.fault(f"tensors of two devices in {name}")
        if not self.kernels.has(name):
            self.fault(f"no kernel for {name}")
        if self.rules == "mps" and name == "_adaptive_avg_pool2d":
            self.fault("adaptive pooling, whose sizes have to divide")
        generator = kwargs.get("generator")
        if generator is not None and (self.seeded_on.get(generator.initial_seed()) == "away") != lands_away:
            self.fault(f"a generator of the other device in {name}")
        if away and (not lands_away or name in READS):
            self.wait(f"reads by {name}")
        elif name in TRANSFERS and near and lands_away and not kwargs.get("non_blocking") and self.rules == "cuda":
            self.wait(f"sends by {name}")

    def wrap(self, leaf, known, lands_away):
        """A result as the tensor it belongs to, or in a new shell."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in known:
            return known[id(leaf)]
        if not lands_away:
            return leaf
        if self.rules == "mps" and leaf.dtype == torch.float64:
            self.fault("float64")
        return Shell(leaf)


def place() -> str:
    """The line of this project that is at work, and the one of Lightning or PyTorch that it called."""
    stack = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)]  # from the innermost
    shown = [(file, line) for file, line in stack if not file.endswith(BETWEEN)]
    own = [(file, line) for file, line in shown if "flowmatch_mnist/" in file]
    return " < ".join(dict.fromkeys(f"{Path(file).name}:{line}" for file, line in (own + shown)[:1] + shown[:1]))


class Shell(torch.Tensor):
    """A tensor of the device: a shell around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner):
        layout = inner.size(), inner.stride(), inner.storage_offset()
        shell = torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=inner.dtype, device=torch.device("away", 0))
        shell.inner = inner
        return shell

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return MACHINE.run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = Shell(self.inner.detach().clone()).requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.inner.detach().clone().__reduce_ex__(protocol)

    def __format__(self, spec):
        return format(self.item(), spec)

    def tolist(self):
        return self.cpu().tolist()


class Watch(TorchDispatchMode):
    """Looks at what is made without a tensor of the device among its arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return MACHINE.run(func, args, kwargs or {})


class Generator(torch._C.Generator):
    """A generator that knows where it was asked for; it draws on the CPU."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.asked = torch.device(device)
        return generator

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.asked

    def manual_seed(self, seed):
        MACHINE.seeded_on[seed] = self.asked.type
        return super().manual_seed(seed)


class Steps(Callback):
    """Tells the machine which training step it is in."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        MACHINE.step = trainer.global_step + 1

    def on_train_epoch_end(self, trainer, pl_module):
        MACHINE.step = 0


class Device:
    """The module that PyTorch asks about a device's machine."""

    is_initialized = staticmethod(lambda: True)
    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)


def install(rules: str) -> None:
    """Make the device this machine's accelerator."""
    _setup_privateuseone_for_python_backend("away", Device())
    for kind in (lightning.pytorch.accelerators.mps.MPSAccelerator, lightning.fabric.accelerators.mps.MPSAccelerator):
        kind.is_available = staticmethod(lambda: True)
        kind.parse_devices = staticmethod(lambda devices: [0])
        kind.get_parallel_devices = staticmethod(lambda devices: [torch.device("away", 0)])
        kind.setup_device = lambda self, device: None
    torch.Generator = Generator
    # Inference tensors cannot be told apart from shells.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()
    # These two make their tensor past every operation that could be looked at.
    make = torch.tensor
    torch.tensor = lambda data, *, device=None, **options: make(data, **options).to(device or HERE)
    torch.as_tensor = lambda data, dtype=None, device=None: (
        data.to(device or data.device, dtype or data.dtype)
        if isinstance(data, torch.Tensor)
        else make(data, dtype=dtype).to(device or HERE)
    )

    from flowmatch_mnist.images import mnist
    from flowmatch_mnist.support import devices

    load = functools.cache(mnist.load)
    mnist.load = lambda folder, split: tuple(values[:1000] for values in load(folder, split))  # 60,000 would take a minute
    if rules == "mps":  # which is asked by its name
        devices.widest_float = lambda device: torch.float64 if device.type == "cpu" else torch.float32
    devices.default_device = lambda: "away"


def main() -> None:
    install(sys.argv[1])
    warnings.simplefilter("ignore")
    statuses, waited = [], []
    for command in json.loads(sys.argv[2]):
        sys.argv[:] = [str(ROOT / command[0]), *command[1:]]
        MACHINE.step, begun, before = 0, time.perf_counter(), MACHINE.waited()
        try:
            with Watch(), contextlib.redirect_stdout(sys.stderr):
                runpy.run_path(sys.argv[0], run_name="__main__")
            statuses.append(0)
        except SystemExit as ended:
            statuses.append(ended.code or 0)
        waited.append(MACHINE.waited() - before)
        print(f"{time.perf_counter() - begun:.1f} s, status {statuses[-1]}: {' '.join(command)}", file=sys.stderr)
    waits = {step: dict(counts) for step, counts in MACHINE.waits.items()}
    print(json.dumps({"statuses": statuses, "waited": waited, "faults": sorted(MACHINE.faults), "waits": waits}))


if __name__ == "__main__":
    sys.modules["stand_in"] = sys.modules["__main__"]  # as configs name its callback
    MACHINE = Machine(sys.argv[1])
    main()
