"""Turns a data set, as its makers publish it, into folders of pictures: ``distrib dataset cifar10 SOURCE DEST``."""
