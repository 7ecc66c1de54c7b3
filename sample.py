"""Draw digits by label with a trained model.

python sample.py 7
python sample.py 0-9 --per-class 8
python sample.py 3 1 4 1 5 --out pi.gif
python sample.py 7 --interpolate 10                       from one noise to another
python sample.py 0-9 --from-image test:0                  the noise of a real digit, under every label
"""

from flowmatch_mnist.sample import main
from flowmatch_mnist.support.errors import exit_on_error

if __name__ == "__main__":
    with exit_on_error():
        main()
