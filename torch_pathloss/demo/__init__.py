"""The main job: a small detector, trained on real handwritten digits with one criterion.

Run it with ``python -m torch_pathloss``; needs the extra ``demo``.
"""
