"""Take a picture of TensorBoard as a browser shows it.

    python docs/screenshots.py --logdir runs

This starts TensorBoard for the runs, opens one of its tabs in Chromium or Chrome without a window, and writes
`docs/tensorboard.png`.
"""

import argparse
import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tensorboard import program

from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABS = ("images", "custom_scalars", "hparams", "text", "scalars", "timeseries")


def photograph(browser: str, url: str, size: tuple[int, int], out: Path) -> None:
    """Write a picture of a page, (width, height) in pixels."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=25000"]
    with tempfile.TemporaryDirectory() as profile, replacing(out) as temporary:
        options += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", f"--screenshot={temporary.absolute()}"]
        done = subprocess.run([browser, *options, url], capture_output=True, text=True, timeout=180, check=False)
        if done.returncode or not temporary.is_file():
            raise UserError(f"{browser} took no picture of {url}: {done.stderr.strip()[-300:]}")


def main() -> None:
    """Start TensorBoard and take the picture."""
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
    logdir, out = options.logdir.resolve(), options.out.resolve()
    board = program.TensorBoard()
    # The picture shows the folder as it is named here: its name in the folder above, and not its whole path.
    with contextlib.chdir(logdir.parent):
        board.configure(argv=[None, "--logdir", logdir.name, "--port", "0", "--load_fast", "false", "--reload_interval", "0"])
        address = board.launch()
        time.sleep(5)  # TensorBoard answers before it has read the events
        photograph(browser, f"{address}#{options.tab}", options.size, out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
