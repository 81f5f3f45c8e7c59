"""The recipes of infra/deploy, as far as they can be checked without a cluster.

python -m pytest tests/infra/test_deploy.py

Tools that are missing are named in the reason of a skip: shellcheck, hadolint, docker with compose,
and the Python packages kubernetes-validate and compose-spec.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from flows.cli import _parser
from infra.spec_files import apply_overrides, parse_spec
from tests.infra.kuberay import KINDS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "infra" / "deploy"
SLURM = DEPLOY / "slurm.sh"
MINIMAL = {"model": {"source": "org/model"}, "data": {"source": "text.txt"}}
TEXTS = {path.name: path.read_text() for path in DEPLOY.iterdir() if path.name != ".env"}
PIN = r"^([a-z0-9.-]+)==([^ ]+)"
PINS = dict(re.findall(PIN, (ROOT / "requirements.lock").read_text(), re.MULTILINE))


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(TEXTS[name]))


def manifest(name: str, kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests(name) if each["kind"] == kind)
    return found


CLUSTERS = {
    "raycluster.yaml": manifest("raycluster.yaml", "RayCluster")["spec"],
    "rayjob.yaml": manifest("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"],
}
PODS = {
    f"{name}: {each['metadata']['labels']['app.kubernetes.io/instance']} {i}": each
    for name, cluster in CLUSTERS.items()
    for i, each in enumerate(
        [cluster["headGroupSpec"]["template"]]
        + [group["template"] for group in cluster["workerGroupSpecs"]]
    )
} | {"submitter": manifest("rayjob.yaml", "RayJob")["spec"]["submitterPodTemplate"]}


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """What every recipe gives `sparseramp`, by itself or by way of slurm.sh."""
    for name, text in TEXTS.items():
        text = re.sub(r"\\\n[# ]*", " ", text)
        for line in re.findall(
            r"(?:sparseramp|slurm\.sh) ((?:search|compare|check|doctor)\b.*)", text
        ):
            yield name, shlex.split(line.split("`")[0], comments=True)


COMMANDS = list(command_lines())


def test_every_recipe_gives_commands() -> None:
    assert {"README.md", "compose.yaml", "raycluster.yaml", "rayjob.yaml", "slurm.sh"} <= {
        name for name, _ in COMMANDS
    }


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda each: " ".join(each))
def test_commands_are_ours_and_so_are_their_keys(name: str, words: list[str]) -> None:
    options = _parser().parse_args(words)
    raw = {section: dict(values) for section, values in MINIMAL.items()}
    apply_overrides(raw, getattr(options, "overrides", []))
    parse_spec(raw, name)
    spec = getattr(options, "spec", "mine.toml")
    if spec.startswith("/opt/sparseramp/"):  # the checkout in the image
        assert (ROOT / spec.removeprefix("/opt/sparseramp/")).is_file()
    elif spec.startswith("/specs/"):  # the config map
        assert Path(spec).name in manifest("rayjob.yaml", "ConfigMap")["data"]
    else:
        assert spec == "mine.toml"


def test_the_spec_in_the_job_is_valid() -> None:
    (text,) = manifest("rayjob.yaml", "ConfigMap")["data"].values()
    spec = parse_spec(tomllib.loads(text), "rayjob.yaml")
    mounts = PODS["rayjob.yaml: sparseramp-llama 0"]["spec"]["containers"][0]["volumeMounts"]
    assert any(spec.run.dir.startswith(f"{each['mountPath']}/") for each in mounts)
    (group,) = CLUSTERS["rayjob.yaml"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert spec.cluster.parallel > int(limits["nvidia.com/gpu"])  # else it never grows


def test_manifests_fit_the_schema_of_kuberay() -> None:
    for name, kind in (("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")):
        jsonschema.validate(manifest(name, kind), KINDS[kind])


def test_the_schema_refuses_a_misspelt_field() -> None:
    wrong = manifest("raycluster.yaml", "RayCluster")
    wrong["spec"]["authOption"] = wrong["spec"].pop("authOptions")
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.validate(wrong, KINDS["RayCluster"])


def test_the_rest_of_the_manifests_fits_the_schema_of_kubernetes() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    others = [each for name in CLUSTERS for each in manifests(name) if each["kind"] not in KINDS]
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
        for pod in PODS.values()
    ]
    for each in others + templates:
        kubernetes.validate(each, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_want_a_token_grow_and_open_no_door(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == PINS["ray"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    assert "enableIngress" not in head
    assert cluster["enableInTreeAutoscaling"] and workers["minReplicas"] < workers["maxReplicas"]
    policy = manifest(name, "NetworkPolicy")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    within, *others = policy["ingress"]
    assert within == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert [each["ports"] for each in others] == [[{"port": 8265}]] * (name == "rayjob.yaml")
    for template in (head["template"], workers["template"]):
        assert labels.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pods_run_as_the_user_of_the_image(pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    assert re.search(rf"^USER {pod['spec']['securityContext']['runAsUser']}$", IMAGE, re.MULTILINE)
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["image"] == compose()["services"]["mlflow"]["image"]


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_the_driver_is_stopped_before_ray_and_keeps_its_run(
    cluster: dict[str, Any], tmp_path: Path
) -> None:
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert "persistentVolumeClaim" in mounts["/runs"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(re.findall(r"timeout (\d+)", command[-1])[0])
    # The hook itself, on a process of another name than the driver's, which others here may have.
    driver = tmp_path / "ramp-of-test"
    driver.write_text(f"#!{sys.executable}\n{STOPS_SLOWLY}")
    driver.chmod(0o755)
    with subprocess.Popen([driver, tmp_path / "stopped"], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        hook = [*command[:-1], command[-1].replace("-x sparseramp", f"-x {driver.name}")]
        subprocess.Popen(hook, stdout=subprocess.DEVNULL)
        assert process.wait(30) == 130
    assert (tmp_path / "stopped").exists()


STOPS_SLOWLY = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[-1]).touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
signal.pause()
"""


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(TEXTS["compose.yaml"])
    return loaded


def test_services_listen_on_loopback_with_a_password_from_outside() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["healthcheck"]["test"][0] == "CMD"
        (volume, *_) = service["volumes"]
        assert volume.split(":")[0] in compose()["volumes"]
        passwords = [v for k, v in service["environment"].items() if "PASSWORD" in k]
        assert [each.split(":?")[0] for each in passwords] == ["${POSTGRES_PASSWORD"]
    image, tag = compose()["services"]["postgres"]["image"].split(":")
    assert image == "postgres" and re.match(r"\d+\.\d+", tag)
    assert "/.env" in TEXTS["Dockerfile.dockerignore"]
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_the_compose_file_fits_its_specification() -> None:
    specification = pytest.importorskip("compose_spec", reason="no compose-spec")
    parsed = specification.PyCompose.from_yaml(TEXTS["compose.yaml"])
    parsed.validate()
    assert set(parsed.service_names()) == {"postgres", "mlflow"}


def test_compose_reads_the_file() -> None:
    if subprocess.run(["sh", "-c", "docker compose version"], capture_output=True).returncode:
        pytest.skip("no `docker compose`")
    command = ["docker", "compose", "-f", DEPLOY / "compose.yaml", "config", "--quiet"]
    given = os.environ | {"POSTGRES_PASSWORD": "x"}
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given.pop("POSTGRES_PASSWORD")
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert "set it in infra/deploy/.env" in done.stderr


IMAGE = TEXTS["Dockerfile"]


def test_the_image_is_pinned_and_locked() -> None:
    instructions = re.findall(r"^([A-Z]+) (.*)$", IMAGE.replace("\\\n", " "), re.MULTILINE)
    (base,) = (rest for name, rest in instructions if name == "FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-[a-z]+", base)
    assert version and version[1] in ("3.11", "3.12", "3.13")  # those of the lock file
    assert not [rest for name, rest in instructions if name == "ADD" or "curl" in rest]
    for rest in re.findall(r"pip install(.*?)(?:&&|$)", IMAGE.replace("\\\n", " "), re.MULTILINE):
        assert "--require-hashes" in rest or "--no-deps --no-build-isolation -e" in rest
    names = [name for name, _ in instructions]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))


def test_the_context_is_what_the_build_needs() -> None:
    kept = {line[1:] for line in TEXTS["Dockerfile.dockerignore"].splitlines() if line[0] == "!"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {"flows", "tasks", "modalities", "infra"}
    needed = {project["readme"], *project["license-files"], "pyproject.toml", "requirements.lock"}
    assert kept == packages | needed


def test_the_second_lock_adds_what_the_image_needs() -> None:
    """Ray's own metadata say what its dashboard needs; nothing is locked twice."""
    second = dict(re.findall(PIN, TEXTS["cluster.lock"], re.MULTILINE))
    assert not second.keys() & PINS.keys()
    wanted = [Requirement(line) for line in [*(requires("ray") or []), "psycopg", "psycopg-binary"]]
    for each in wanted:
        if not each.marker or each.marker.evaluate({"extra": "default"}):
            name = each.name.replace("_", "-").lower()
            assert each.specifier.contains((PINS | second)[name]), each


@pytest.mark.parametrize(
    "command", [["shellcheck", SLURM], ["hadolint", DEPLOY / "Dockerfile"]], ids=lambda c: c[0]
)
def test_linters_have_nothing_to_say(command: list[str]) -> None:
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
