"""Build the page in this folder with `python docs/demo/build.py`. Any static host can then serve the folder.

The script writes these files into `built/`: two velocity fields as ONNX, noise, the settings of the sampler, and ONNX Runtime
from its npm package. So the page loads nothing from other servers. The script needs npm and `pip install -e '.[onnx]'`. Without
--plane, it first trains the field of the plane, in a minute.

    python docs/demo/build.py && python -m http.server -d docs/demo
"""

import argparse
import gzip
import logging
import subprocess
import sys
import tarfile
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from flowmatch_mnist.images.mnist import npm_pack
from flowmatch_mnist.sampling.generate import Flow, draw_noise
from flowmatch_mnist.sampling.weights import load, newest_checkpoint, weights_path
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing, save_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNTIME = "onnxruntime-web@1.27.0"
PROGRAM, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
NOISES = 100
"""Number of digits with the same noise as in `sample.py` with seed 0. The browser draws all other noise itself."""


class Field(nn.Module):
    """A network with labels in int32, because JavaScript has arrays of int32: x (n, ...), t (n,), y (n,) -> v (n, ...)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity."""
        velocity: Tensor = self.net(x, t, y.long())
        return velocity


def write_field(flow: Flow, path: Path) -> None:
    """Write a velocity field as ONNX. Large weights are stored in 16 bits.

    Raises:
        UserError: if the network does not predict the velocity on the straight path, or only over one step.
    """
    if flow.one_step:
        raise UserError("the page draws in several steps, but these weights learned only one; use other weights")
    if (flow.path, flow.prediction) != ("linear", "velocity"):
        raise UserError(f"the page needs velocity on the linear path, not {flow.prediction} on {flow.path}; use other weights")
    n = torch.export.Dim("n", min=1)
    example = (torch.randn(2, *flow.net.shape), torch.rand(2), torch.tensor([0, 1], dtype=torch.int32))
    flow.net.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            Field(flow.net).eval(),
            example,
            input_names=["x", "t", "y"],
            output_names=["v"],
            dynamic_shapes={"x": {0: n}, "t": {0: n}, "y": {0: n}},
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    model = written.model_proto
    graph, casts = model.graph, []
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT and np.prod(weight.dims) > 1000:
            name, values = weight.name, numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_16"))
            casts.append(helper.make_node("Cast", [f"{name}_16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    with replacing(path) as temporary:
        onnx.save(model, temporary)


def fetch_runtime(built: Path) -> None:
    """Extract ONNX Runtime from its npm package, and compress its binary. The page decompresses it."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            package = npm_pack(RUNTIME, Path(scratch))
        except OSError as error:
            raise UserError(f"cannot download {RUNTIME}: {error}; install npm, or check the network") from error
        with tarfile.open(package) as archive:
            for name, target, pack in ((PROGRAM, "ort.mjs", bytes), (BINARY, "ort.wasm.gz", gzip.compress)):
                content = archive.extractfile(f"package/dist/{name}")
                assert content is not None
                with replacing(built / target) as temporary:
                    temporary.write_bytes(pack(content.read()))


def train_plane() -> Path:
    """Train the second lesson, and return the path of its checkpoint."""
    config = ROOT / "configs" / "toy_prompted.yaml"
    subprocess.run([sys.executable, ROOT / "train.py", "fit", "--config", config], check=True)
    return newest_checkpoint(name="toy_prompted")


def main() -> None:
    """Parse the command line and build the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="mnist", help="weights for the digits: a checkpoint or a name (default: mnist)")
    parser.add_argument("--plane", type=Path, help="checkpoint of configs/toy_prompted.yaml (default: train one)")
    parser.add_argument("--out", type=Path, default=HERE / "built", help="folder for the files (default: docs/demo/built)")
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    flow, sampler = load(weights_path(options.weights))
    options.out.mkdir(parents=True, exist_ok=True)
    write_field(flow, options.out / "digits.onnx")
    fetch_runtime(options.out)
    write_field(load(options.plane or train_plane())[0], options.out / "plane.onnx")
    noise = draw_noise(NOISES, flow.net.shape, streams.generator("cpu", 0, "sampling"))
    with replacing(options.out / "noise.bin") as temporary:
        temporary.write_bytes(noise.numpy().astype("<f4").tobytes())
    save_json(options.out / "settings.json", {"sampler": asdict(sampler), "weights": options.weights, "noises": NOISES})
    size = sum(path.stat().st_size for path in options.out.iterdir()) / 1e6
    print(f"wrote {options.out}, {size:.1f} MB; look at it with: python -m http.server -d {HERE}")


if __name__ == "__main__":
    with exit_on_error():
        main()
