"""Draw digits by label with a trained model: `python sample.py 7`. `python sample.py --help` says the rest."""

from flowmatch_mnist.sample import main
from flowmatch_mnist.support.errors import exit_on_error

if __name__ == "__main__":
    with exit_on_error():
        main()
