"""Train a class-conditional flow-matching model on MNIST, or train one of the lessons before it.

python train.py                                          train with configs/mnist.yaml
python train.py --config configs/quick.yaml              16 minutes on two CPU cores
python train.py --config configs/toy.yaml                the first lesson, in under a minute
python train.py fit|validate|test|predict --help         all commands and their options
"""

from flowmatch_mnist.training.cli import main

if __name__ == "__main__":
    main()
