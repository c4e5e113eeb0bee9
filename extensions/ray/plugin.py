"""Serving and scoring on Ray: ``ade serve --engine ray`` and ``ade score --engine ray``."""

from ade_base.extensions import Engine, Extension

EXTENSION = Extension(
    options={
        "score": "extensions.ray.options:of_score",
    },
    engines={
        "ray": Engine(
            "extensions.ray.serve.pool:Pool",
            "ray",
            "can use several machines: those of the cluster that RAY_ADDRESS names",
            packages=("ray",),
            variables=("RAY_",),
        )
    },
    score_engines={
        "ray": Engine(
            "extensions.ray.bulk.score:score_on_ray",
            "ray",
            "can use several machines; IMAGES is then a folder or a Parquet file with a column "
            "path, also as a URL such as s3://…, and --out a folder",
            on_clusters=True,
        )
    },
)
