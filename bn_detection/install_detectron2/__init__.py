"""Detectron2 v0.6 without a compiler, as a pure-Python wheel.

Detectron2's compiled part is deformable convolution, rotated boxes and a fast COCO evaluation; the
rest of it is Python. The installer fetches the source archive of v0.6 from the package index,
checks its hash, applies ``detectron2-0.6.patch``, and installs the result as a wheel. A compiled
operator, when it is used, raises an error that names it and says how to get it. A Detectron2 that
is already installed, of whatever version, is kept as it is.

It needs pip, setuptools, torch and torchvision in the environment, and nothing else.
"""
