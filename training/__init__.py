"""Training of AV-ADE and of the systems it is compared with.

Start with :mod:`training.loop`.
"""
