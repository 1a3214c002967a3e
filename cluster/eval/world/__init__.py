"""The world the nano model lives in: coloured shapes, short numbers, short clips, and questions about them.

Everything is drawn from a ``random.Random``: the same state gives the same world.
"""
