"""The files in deploy/, checked without a cluster or a container engine.

The tools are used where they are installed: promtool, kustomize and docker-compose (Debian
packages), gixy, yamllint and kubernetes-validate (extra ``dev``).
"""

from __future__ import annotations

import copy
import json
import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ade_base.ports import VARIABLES
from ade_base.system import available_cores
from ade_cli.main import parse
from handlers.front.admission import Limits
from handlers.front.exposition import REFUSALS, START
from handlers.front.settings import TOKEN_VARIABLE
from handlers.launch.launcher import DRAIN_S
from handlers.launch.serve import _allowed_hosts
from handlers.processes.supervision import KILL_TIMEOUT_S, STOP_TIMEOUT_S
from serving.api.telemetry import METRICS
from serving.engine.bundle import open_bundle
from serving.page import sweep, uploads
from serving.page.app import make_app
from tests.helpers import PRETRAINED, ROOT, WORKER_LABELS, tool
from tests.test_docker import STEPS, USER

DEPLOY = ROOT / "deploy"
RULES = [DEPLOY / "prometheus" / name for name in ("gate-rules.yml", "service-rules.yml")]
RULE_TESTS = [ROOT / "tests" / "data" / f"{path.stem}-test.yml" for path in RULES]
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
DEVICES = {"cpu": "cpu", "gpu": "cuda"}
STYLE = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"


def load(path):
    return yaml.safe_load(path.read_text())


# Prometheus


def test_alarms_are_about_metrics_that_exist():
    known = {metric.name: {*WORKER_LABELS, *metric.labels} for metric in METRICS}
    known |= {m.name: set(m.labels) for m in (REFUSALS, START)}
    known["up"] = set()
    rules = [rule for path in RULES for group in load(path)["groups"] for rule in group["rules"]]
    for rule in rules:
        names = re.findall(r"\b((?:ade|process)_\w+|up\b)(?:\{([^}]*)\})?", rule["expr"])
        assert names, rule["alert"]
        for name, labels in names:
            used = set(re.findall(r"(\w+)=", labels))
            assert used <= known[name] | SCRAPED, rule["alert"]
            for grouped in re.findall(r"by \(([^)]*)\)", rule["expr"]):
                assert set(grouped.split(", ")) <= known[name] | SCRAPED, rule["alert"]
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert named <= set().union(*(known[name] for name, _ in names)) | SCRAPED, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
    assert len(rules) == 12


@pytest.mark.parametrize(
    "command", [("check", "rules", *RULES), *(("test", "rules", path) for path in RULE_TESTS)]
)
def test_promtool_accepts_the_alarms(command):
    """Among others, neither one restart of a worker nor one high sum is an alarm."""
    done = subprocess.run([tool("promtool"), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Kubernetes


@pytest.fixture(scope="module")
def pod():
    return load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (only,) = pod["containers"]
    return only


def test_every_manifest_is_reached_from_an_overlay():
    reached: set[Path] = set()
    folders = [KUBERNETES / "overlays" / name for name in OVERLAYS]
    while folders:
        folder = folders.pop()
        reached.add(folder / "kustomization.yaml")
        found = load(folder / "kustomization.yaml")
        names = [*found.get("resources", []), *found.get("components", [])]
        for path in [folder / n for n in names + [p["path"] for p in found.get("patches", [])]]:
            assert path.exists(), path
            (folders.append if path.is_dir() else reached.add)(path.resolve())
    assert {path.resolve() for path in reached} == set(KUBERNETES.rglob("*.yaml"))


def test_the_pod_has_no_rights(pod, container):
    """It has the image's user, and can write only where the service must."""
    context = pod["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] == context["runAsGroup"] == USER
    assert not pod["automountServiceAccountToken"]
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert ("WORKDIR", "/home/ade") in STEPS
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"cache": "/home/ade/.cache", "tmp": "/tmp"}
    assert {volume["name"]: set(volume) for volume in pod["volumes"]} == {
        name: {"name", "emptyDir"} for name in mounts
    }


def test_the_pods_arguments_are_those_of_the_command(container):
    words = [word.replace("$(NAMESPACE)", "default") for word in container["args"]]
    args = parse(["serve", *words])
    assert args.expose_metrics
    services = yaml.safe_load_all((KUBERNETES / "base" / "service.yaml").read_text())
    assert set(_allowed_hosts(args.allowed_hosts, args.host)) == {
        service["metadata"]["name"] + domain
        for service in services
        for domain in ("", ".default", ".default.svc", ".default.svc.cluster.local")
    }
    assert ("COPY", "pretrained /bundles") in STEPS
    assert all((ROOT / "pretrained" / bundle.name).is_dir() for bundle in args.bundles)
    known = {"NAMESPACE", TOKEN_VARIABLE}
    assert {variable["name"] for variable in container["env"]} == known


def test_ports_and_probes(pod, container, tmp_path, monkeypatch):
    named = {"api": "inference", "metrics": "metrics", "page": "ui"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {name: VARIABLES[ours][1] for name, ours in named.items()}
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/readyz", "port": "page"}
    assert "/readyz" in {getattr(route, "path", None) for route in page.routes}
    assert container["livenessProbe"]["tcpSocket"]["port"] in ports
    services = list(yaml.safe_load_all((KUBERNETES / "base" / "service.yaml").read_text()))
    offered = {p["name"]: p for service in services for p in service["spec"]["ports"]}
    assert {name: (p["port"], p["targetPort"]) for name, p in offered.items()} == {
        name: (port, name) for name, port in ports.items()
    }
    # No alarm finds the metrics under another name of the job, which is the service's.
    assert [s["metadata"]["name"] for s in services] == ["ade", "ade-page"]
    (pause,) = [int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"][1:]]
    stopping = DRAIN_S + STOP_TIMEOUT_S + KILL_TIMEOUT_S
    assert pod["terminationGracePeriodSeconds"] >= pause + stopping
    composed = load(DEPLOY / "compose.yaml")["services"]
    grace = {name: composed[name]["stop_grace_period"] for name in ("ade", "nginx")}
    assert int(grace["ade"].removesuffix("s")) >= stopping
    # nginx stops before the service, and must get its answers.
    nginx = (DEPLOY / "nginx.conf").read_text()
    (waits,) = set(re.findall(r"proxy_read_timeout (\d+)s;", nginx))
    assert int(grace["nginx"].removesuffix("s")) > int(waits)
    page = (ROOT / "docs" / "how-to" / "open-to-a-network.md").read_text()
    (unit,) = re.findall(r"^TimeoutStopSec=(\d+)$", page, re.MULTILINE)
    assert int(unit) > int(waits)
    # A request that nginx gives up would still be computed, and repeated by its client.
    assert int(waits) > Limits.waiting_s + Limits.upstream_s


def test_logs_outlive_the_container(container):
    """An alarm that the service was started again names files that have the reason."""
    runtime, _ = yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())
    (kserve,) = runtime["spec"]["containers"]
    composed = load(DEPLOY / "compose.yaml")["services"]["ade"]
    assert "cache:/home/ade/.cache" in composed["volumes"]
    for arguments in (container["args"], kserve["args"], composed["command"]):
        assert "--logs=/home/ade/.cache/logs" in " ".join(arguments).replace("--logs ", "--logs=")
    for one in (container, kserve):
        mounted = [mount["mountPath"] for mount in one["volumeMounts"]]
        assert "/home/ade/.cache" in mounted


def test_secrets_are_those_that_are_read(container):
    (given,) = [v["valueFrom"] for v in container["env"] if v["name"] == TOKEN_VARIABLE]
    secret = {"name": "ade-token", "key": TOKEN_VARIABLE}
    assert given == {"secretKeyRef": secret}
    (endpoint,) = load(KUBERNETES / "monitoring" / "servicemonitor.yaml")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": secret}
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    command = (KUBERNETES / "base" / "kustomization.yaml").read_text()
    assert f"secret generic ade-token --from-file={TOKEN_VARIABLE}=/dev/stdin" in command


def test_the_clusters_alarms_are_prometheuss():
    """The service's and the gate's: the manifest is what the script makes of their files."""
    path = KUBERNETES / "monitoring" / "prometheusrule.yaml"
    made = subprocess.run(
        [sys.executable, KUBERNETES / "prometheusrule.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert path.read_text() == made.stdout, "run deploy/kubernetes/prometheusrule.py"
    rule = load(path)
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"]["groups"] == [group for path in RULES for group in load(path)["groups"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders_valid_objects(overlay):
    """Validated by Kubernetes's schemas, which lack the Prometheus Operator's objects."""
    validator = pytest.importorskip("kubernetes_validate")
    done = subprocess.run(
        [tool("kustomize"), "build", KUBERNETES / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=True,
    )
    documents = list(yaml.safe_load_all(done.stdout))
    for item in documents:
        if item["kind"] not in ("PrometheusRule", "ServiceMonitor"):
            validator.validate(item, "1.31", strict=True)
    objects = {item["kind"]: item for item in documents}
    deployment = objects["Deployment"]["spec"]
    (only,) = deployment["template"]["spec"]["containers"]
    assert re.fullmatch(
        rf"registry\.example\.org/av-ade:[\d.]+-{DEVICES[overlay]}",
        only["image"],
    )
    assert {"cpu", "memory"} <= set(only["resources"]["limits"]) & set(
        only["resources"]["requests"]
    )
    assert ("nvidia.com/gpu" in only["resources"]["limits"]) == (overlay == "gpu")
    rolling = deployment["strategy"]["rollingUpdate"]
    surge = 0 if overlay == "gpu" else 1  # there may be no spare GPU
    assert rolling == {"maxSurge": surge, "maxUnavailable": 1 - surge}
    # A fixed number of replicas would work against the autoscaler.
    assert ("HorizontalPodAutoscaler" in objects) != ("replicas" in deployment)
    if scaler := objects.get("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", "ade")
        budget = objects["PodDisruptionBudget"]["spec"]
        assert scaler["spec"]["minReplicas"] > budget["maxUnavailable"] == 1
        assert budget["selector"] == deployment["selector"]


@pytest.mark.parametrize(
    "text, cores", [("100000 100000", 1), ("150000 100000", 2), ("max 100000", None), ("", None)]
)
def test_a_containers_limit_bounds_the_cores(tmp_path, text, cores):
    """Otherwise a pod with one core of sixty-four would start processes and threads for all."""
    (tmp_path / "cpu.max").write_text(text)
    (tmp_path / "none").write_text("max 1")
    most = available_cores(tmp_path / "none")
    assert available_cores(tmp_path / "cpu.max") == (most if cores is None else min(cores, most))
    assert available_cores(tmp_path / "missing") == most >= 1


# Objects of operators


def operators_objects():
    """Each object of an operator in deploy/, by its kind."""
    paths = [
        DEPLOY / "kserve.yaml",
        *(KUBERNETES / "monitoring").glob("[ps]*.yaml"),
    ]
    return {item["kind"]: item for path in paths for item in yaml.safe_load_all(path.read_text())}


def test_objects_of_operators_are_valid():
    """Also without unknown fields, which an API server drops with a warning.

    The schemas are those of KServe and the Prometheus Operator in
    August 2026 (all Apache License 2.0), without descriptions, and strict.
    """
    jsonschema = pytest.importorskip("jsonschema")
    packed = (ROOT / "tests" / "data" / "crds.json.xz").read_bytes()
    schemas = json.loads(lzma.decompress(packed))
    objects = operators_objects()
    assert {name.split()[0] for name in schemas} == set(objects) - {"Component"}
    for name, schema in schemas.items():
        validator = jsonschema.Draft7Validator(schema)
        item = objects[name.split()[0]]
        assert [error.message for error in validator.iter_errors(item)] == []
        wrong = copy.deepcopy(item)
        wrong["spec"]["unknown"] = 1
        assert not validator.is_valid(wrong)


# KServe


def test_kserve_runs_the_same_container(pod, container):
    """Its runtime and service make the Deployment's pod, but for the engine, probes and bundle."""
    validator = pytest.importorskip("kubernetes_validate")
    runtime, service = yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())
    predictor = service["spec"]["predictor"]
    own = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout", "model"}
    (served,) = runtime["spec"]["containers"]
    assert served["name"] == "kserve-container"
    made = {key: value for key, value in predictor.items() if key not in own}
    made |= {"containers": [served], "volumes": runtime["spec"]["volumes"]}
    spec = {"metadata": {"name": "ade"}, "spec": made}
    validator.validate({"apiVersion": "v1", "kind": "Pod"} | spec, "1.31", strict=True)
    assert {key: made[key] for key in pod if key != "containers"} == {
        key: value for key, value in pod.items() if key != "containers"
    }
    for key in ("lifecycle", "securityContext", "volumeMounts"):
        assert served[key] == container[key], key
    port = VARIABLES["inference"][1]
    assert served["livenessProbe"] == container["livenessProbe"] | {"tcpSocket": {"port": port}}
    assert served["env"] == [v for v in container["env"] if v["name"] == TOKEN_VARIABLE]
    patch = load(KUBERNETES / "overlays" / "cpu" / "resources.yaml")
    (cpu,) = patch["spec"]["template"]["spec"]["containers"]
    assert served["resources"] == cpu["resources"]


def test_kserve_finds_the_runtime_and_reaches_the_service():
    runtime, service = yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())
    (accepted,) = runtime["spec"]["supportedModelFormats"]
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {key: accepted[key] for key in ("name", "version")}
    assert [model["protocolVersion"]] == runtime["spec"]["protocolVersions"] == ["v2"]
    (served,) = runtime["spec"]["containers"]
    meta = {"{{.Name}}": "ade", "{{.Namespace}}": "default"}
    words = [re.sub(r"{{\.\w+}}", lambda m: meta[m[0]], word) for word in served["args"]]
    args = parse(["serve", *words])
    assert args.engine == "process" and [str(b) for b in args.bundles] == ["/mnt/models"]
    inside = {f"ade-predictor{d}" for d in ("", ".default", ".default.svc")}
    assert set(_allowed_hosts(args.allowed_hosts, args.host)) == {
        *inside,
        "ade-predictor.default.svc.cluster.local",
        "ade-default.example.com",
        "ade-predictor-default.example.com",
    }
    assert service["spec"]["predictor"]["timeout"] >= 245  # what a request may take
    for probe in ("startupProbe", "readinessProbe"):
        assert served[probe]["httpGet"] == {
            "path": "/v2/health/ready",
            "port": VARIABLES["inference"][1],
        }


# docker compose


def test_compose_finds_its_files():
    services = load(DEPLOY / "compose.yaml")["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./") and source != "./secrets":  # made by the operator
                assert (DEPLOY / source).exists(), source
    assert parse(["serve", "--host", "0.0.0.0", *services["ade"]["command"]]).host == "127.0.0.1"
    assert [name for name, s in services.items() if "ports" in s] == ["network"]
    assert all(
        s["network_mode"] == "service:network" for n, s in services.items() if n != "network"
    )
    # nginx's temporary files, which may hold images, are in memory.
    (prefix,) = re.findall(r"nginx .*-p (\S+)/ ", services["nginx"]["command"][-1])
    assert services["nginx"]["tmpfs"] == [prefix]
    # Not a tmpfs, which is memory, and noexec: TorchServe loads a native library from there.
    assert services["ade"]["volumes"] == ["cache:/home/ade/.cache"] and services["ade"]["read_only"]
    assert any("--owner ade" in step and "/home/ade/.cache" in step for _, step in STEPS)


def test_compose_bounds_its_logs():
    for service in load(DEPLOY / "compose.yaml")["services"].values():
        assert service["logging"]["driver"] == "local"
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}


def test_nginx_reads_secrets_that_were_replaced():
    """They are in a mounted folder, and the reload that the pages name finds the process."""
    nginx = load(DEPLOY / "compose.yaml")["services"]["nginx"]
    configuration = (DEPLOY / "nginx.conf").read_text()
    named = re.findall(r"(?:include|ssl_certificate(?:_key)?) (\S+);", configuration)
    assert named == [f"secrets/{name}" for name in ("keys.conf", "certificate.pem", "key.pem")]
    assert "./nginx.conf:/etc/ade/nginx.conf:ro" in nginx["volumes"]
    assert "./secrets:/etc/ade/secrets:ro" in nginx["volumes"]
    page = (ROOT / "docs" / "how-to" / "open-to-a-network.md").read_text()
    (options,) = re.findall(r"docker exec ade-nginx-1 nginx (.*) -s reload", page)
    assert load(DEPLOY / "compose.yaml")["name"] == "ade"
    assert f"exec nginx {options} -g " in nginx["command"][-1]


def test_the_working_folder_holds_what_the_page_keeps():
    """Its uploads and results, besides models, archives and logs."""
    pod = load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    (limit,) = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "cache"]
    assert int(limit.removesuffix("Gi")) * 2**30 >= uploads.ALL_BYTES + sweep.MAX_BYTES + 2 * 2**30


def test_an_image_for_a_gpu_gets_one():
    """The image of compose.yaml alone is for the CPU, the Dockerfile's default."""
    assert "args" not in load(DEPLOY / "compose.yaml")["services"]["ade"]["build"]
    ade = load(DEPLOY / "compose.gpu.yaml")["services"]["ade"]
    assert ade["build"]["args"] == {"DEVICE": "cuda"}
    (device,) = ade["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_compose_accepts_it():
    compose = shutil.which("docker-compose") or "/usr/libexec/docker/cli-plugins/docker-compose"
    if not Path(compose).exists():
        pytest.skip("docker-compose is not installed")
    command = [compose, "-f", DEPLOY / "compose.yaml", "config", "--quiet"]
    with_gpu = [*command[:3], "-f", DEPLOY / "compose.gpu.yaml", *command[3:]]
    for one in (command, with_gpu):
        done = subprocess.run(one, capture_output=True, text=True, env={"GRAFANA_PASSWORD": "x"})
        assert done.returncode == 0, done.stderr
    refused = subprocess.run(command, capture_output=True, text=True, env={})
    assert refused.returncode != 0 and "set a password for Grafana" in refused.stderr


def test_prometheus_reads_its_configuration():
    found = load(DEPLOY / "prometheus" / "prometheus.yml")
    (job,) = found["scrape_configs"]
    assert job["job_name"] == "ade"
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{VARIABLES['metrics'][1]}"]}]
    assert all(any(path.match(p) for p in found["rule_files"]) for path in RULES)
    command = [tool("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Style


def test_the_workflow_installs_the_tools_of_the_tests():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (tools,) = re.findall(
        r"^for tool in (.*); do$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE
    )
    packages = {"nginx-light" if name == "nginx" else name for name in tools.split()}
    installed = [set(x.split()) for x in re.findall(r"apt-get install --yes (.*)", workflow)]
    assert installed == [packages] * 2


def test_yamllint():
    pytest.importorskip("yamllint")
    from yamllint import config, linter

    files = [*DEPLOY.rglob("*.y*ml"), *RULE_TESTS]
    style = config.YamlLintConfig(STYLE)
    problems = [f"{p.name}: {x}" for p in files for x in linter.run(p.read_text(), style)]
    assert len(files) > 12 and problems == []


def test_gixy():
    """Its finding that a path is normalised is wrong here: the path is one word of the pattern."""
    command = [tool("gixy"), "--skips", "proxy_pass_normalized", DEPLOY / "nginx.conf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and ">> Problem" not in done.stdout, done.stdout


def test_the_documented_patch_changes_the_bundle(container):
    """docs/how-to/containers.md counts the arguments of the Deployment."""
    page = (ROOT / "docs" / "how-to" / "containers.md").read_text()
    (block,) = re.findall(r"```yaml\n(patches:.*?)```", page, re.DOTALL)
    (patch,) = (one for one in yaml.safe_load(block)["patches"] if "patch" in one)
    replaced, added = yaml.safe_load(patch["patch"])
    arguments = list(container["args"])
    arguments[int(replaced["path"].rpartition("/")[2])] = replaced["value"]
    arguments.append(added["value"])
    found = parse(arguments if arguments[0] == "serve" else ["serve", *arguments])
    assert list(map(str, found.bundles)) == ["/bundles/mine"]
    assert found.allowed_hosts == "ade.example.org"


def test_the_documented_limits_are_those_of_the_proxy():
    """An address has its limit twice, because those of a location replace those of the server."""
    proxy = (DEPLOY / "nginx.conf").read_text()
    (rate,) = re.findall(r"zone=requests:\S+ rate=(\d+)r/s", proxy)
    (burst,) = re.findall(r"limit_req zone=requests burst=(\d+) ", proxy)
    (of_key,) = re.findall(r"limit_conn connections (\d+);", proxy)
    of_server, of_location = re.findall(r"limit_conn addresses (\d+);", proxy)
    (open_rate,) = re.findall(r"zone=open:\S+ rate=(\d+)r/s", proxy)
    page = (ROOT / "docs" / "how-to" / "open-to-a-network.md").read_text()
    assert of_server == of_location and " ".join(
        f"each key may have {of_key} requests at a time, and {rate} per second ({burst} more in a "
        f"burst). Each address may have {of_server} requests at a time, and {open_rate} per second "
        "to".split()
    ) in " ".join(page.split())
