"""Lossless compression with a model: ``ade compress`` and ``ade decompress``."""

from ade_base.extensions import Extension, Verb

EXTENSION = Extension(
    verbs={
        "compress": Verb(
            "compress images without loss, with a bundle's model", "ade_cli.compress", "codec"
        ),
        "decompress": Verb(
            "restore the images of an archive of ade compress", "ade_cli.decompress", "codec"
        ),
    }
)
