"""The Serve application: a deployment for each operation of each bundle, a front before them.

``import_path: extensions.ray.serve.app:build`` in the configuration file of a cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from extensions.ray.serve.ingress import Ingress
from extensions.ray.serve.replica import Replica
from extensions.ray.serve.reporter import MetricsReplica
from extensions.ray.serve.settings import Access, ServeSettings
from handlers.limits import MAX_BATCH, QUEUE_SIZE
from handlers.service.application import served_models
from handlers.service.worker import WorkerSettings
from serving.engine.bundle import open_bundle

BY_REQUESTS = AutoscalingPolicy(policy_function="extensions.ray.serve.scaling:by_requests")
FRONT, METRICS = "front", "metrics"  # names of deployments, which no model has
HEALTH_S = 5.0  # between two health checks
MAX_REQUESTS = 100_000  # that Ray passes on to a front at a time
STOP_S = 25.0  # that requests which were accepted may take once a replica is asked to stop
UPSCALE_S, DOWNSCALE_S = 5.0, 60.0  # that a queue must be long, or short, for the number to change


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a cluster.

    Args:
        args: see :class:`extensions.ray.serve.settings.ServeSettings`.

    Raises:
        SettingsError: they cannot be used.
    """
    return application(ServeSettings.of(args), None)


def application(settings: ServeSettings, access: Access | None) -> serve.Application:
    """The application.

    Args:
        settings: what is served and by how many replicas.
        access: who may use it; as the cluster's environment says unless given.
    """
    metrics = (
        serve.deployment(MetricsReplica)
        .options(name=METRICS, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
        .bind()
    )
    handles = {}
    bundles = [open_bundle(Path(folder)) for folder in settings.bundles]
    for name, operation, bundle in served_models(bundles):
        worker = WorkerSettings(
            str(bundle.folder),
            bundle.model_id,
            bundle.digest,
            operation,
            name,
            name,
            settings.logs,
            settings.options,
        )
        handles[name] = (
            serve.deployment(Replica)
            .options(
                name=name,
                # Calls, each of one to MAX_BATCH requests; the fronts bound the requests.
                max_ongoing_requests=2 * MAX_BATCH,
                max_queued_requests=QUEUE_SIZE,
                ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
                **_lifetime(settings.replicas[operation], policy=BY_REQUESTS),
            )
            .bind(worker, metrics)
        )
    return (
        serve.deployment(Ingress)
        .options(
            name=FRONT,
            # The front itself refuses what is too much. More than this would wait before its limits
            # on time, size and memory, so it is more than the connections that HAProxy allows.
            max_ongoing_requests=MAX_REQUESTS,
            ray_actor_options={"num_cpus": min(settings.cpus, 0.5)},
            **_lifetime(settings.fronts, target_ongoing_requests=QUEUE_SIZE // 4),
        )
        .bind(settings, access, metrics, handles, [(b.model_id, b.digest) for b in bundles])
    )


def _lifetime(replicas: tuple[int, int], **scaling: Any) -> dict[str, Any]:
    """How many replicas there are, and how they end."""
    least, most = replicas
    number: dict[str, Any] = (
        {"num_replicas": least}
        if least == most
        else {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                upscale_delay_s=UPSCALE_S,
                downscale_delay_s=DOWNSCALE_S,
                **scaling,
            )
        }
    )
    return {
        **number,
        "health_check_period_s": HEALTH_S,
        "graceful_shutdown_timeout_s": STOP_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
