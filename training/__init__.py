"""Training of AV-ADE and of the systems that it is compared with.

Start with :mod:`training.loop`.
"""
