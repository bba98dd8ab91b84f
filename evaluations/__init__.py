"""How good a set of images is: scores of samples against real images, on their features."""
