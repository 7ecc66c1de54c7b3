"""Train a class-conditional flow-matching model on MNIST, or the lessons before it.

python train.py                                          the defaults of configs/mnist.yaml
python train.py --config configs/quick.yaml              about ten minutes on a laptop
python train.py --config configs/toy.yaml                the first lesson, under a minute
python train.py fit|validate|test|predict --help         everything else
"""

from flowmatch_mnist.training.cli import main

if __name__ == "__main__":
    main()
