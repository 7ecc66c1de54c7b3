"""Draw digits by label with a trained model: `python sample.py 7`. See `python sample.py --help`."""

from flowmatch_mnist.sample import main

if __name__ == "__main__":
    main()
