"""Take a picture of TensorBoard as a browser shows it.

    python docs/screenshots.py --logdir runs

This starts TensorBoard for the runs, opens one of its tabs in Chromium or Chrome without a window, and writes
`docs/tensorboard.png`.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABS = ("images", "custom_scalars", "hparams", "text", "scalars", "timeseries")
PATIENCE = 60
"""Seconds until TensorBoard must answer."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    start = time.monotonic()
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() - start > PATIENCE:
                raise UserError(
                    f"TensorBoard did not start within {PATIENCE} s ({error}); try `tensorboard --logdir` by hand"
                ) from None
            time.sleep(0.5)


def photograph(browser: str, url: str, size: tuple[int, int], out: Path) -> None:
    """Write a picture of a page, (width, height) in pixels."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=25000"]
    with tempfile.TemporaryDirectory() as profile, replacing(out) as temporary:
        options += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", f"--screenshot={temporary.absolute()}"]
        done = subprocess.run([browser, *options, url], capture_output=True, text=True, timeout=180, check=False)
        if done.returncode or not temporary.is_file():
            raise UserError(f"{browser} took no picture of {url}: {done.stderr.strip()[-300:]}")


def main() -> None:
    """Start TensorBoard, take the picture, and stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="the folder of the runs (default: runs)")
    parser.add_argument("--tab", choices=TABS, default="images", help="which tab to open (default: images)")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 640), metavar=("WIDTH", "HEIGHT"), help="in pixels")
    parser.add_argument("--out", type=Path, default=Path("docs/tensorboard.png"), help="(default: docs/tensorboard.png)")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"there is no browser; install one of {', '.join(BROWSERS)}")
    if not any(options.logdir.rglob("events.out.tfevents.*")):
        raise UserError(f"{options.logdir} holds no run; train one with `python train.py --config configs/quick.yaml`")
    port = free_port()
    # Started in the folder above, so that the picture shows the name of the folder and not its whole path.
    logdir = options.logdir.resolve()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(command, cwd=logdir.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://localhost:{port}/data/logdir")
        time.sleep(5)  # TensorBoard answers before it has read the events
        photograph(browser, f"http://localhost:{port}/#{options.tab}", options.size, options.out)
    finally:
        server.terminate()
        server.wait()
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
