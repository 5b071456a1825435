"""The parts of a model that may be exchanged: attention, norm, feed-forward layers.

`settings` says which there are and what they may be told, without torch; `attention`, `norm` and `feedforward` build
them, each from one dict; `ranges` keeps what goes into them small.
"""
