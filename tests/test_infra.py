"""The files of infra/ against the specifications and programs that will read them; no container is built here.

The Ray manifests are checked against the fields of KubeRay's v1 API that they use, as listed here. No package holds its
schemas; `POLYTROPE_KUBERAY_CRDS=DIR` takes these instead, from a checkout of ray-project/kuberay: DIR is its
`ray-operator/config/crd/bases` (done last with commit feeaf72 of 2026-08-19).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from polytrope.pipeline.commands.cli import build_parser
from polytrope.pipeline.workflow.spec import load_workflow

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
MANIFESTS = ("raycluster", "rayjob")
USER = 10001  # of the image


def version_of(package: str) -> str:
    match = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


# -- Compose -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return loaded


def test_compose_file_follows_the_specification(compose: dict[str, Any]) -> None:
    specification = pytest.importorskip("compose_spec").PyCompose
    parsed = specification.from_json(json.dumps(compose))
    assert set(parsed.service_names()) == {"ray-head", "ray-worker", "mlflow", "postgres", "object-store", "buckets"}
    for place, value in (("healthchek", {}), ("scale", "two"), ("depends_on", {"mlflow": {"condition": "happy"}})):
        wrong = copy.deepcopy(compose)
        wrong["services"]["ray-worker"][place] = value
        with pytest.raises(ValueError, match=r"healthchek|expected u64|happy"):  # the check is a strict one
            specification.from_json(json.dumps(wrong))


def test_compose_services_wait_for_what_they_need_and_show_no_secret(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, name
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], f"{name} waits for the health of {needed}"
        for variable, value in service.get("environment", {}).items():
            if re.search("TOKEN|PASSWORD|SECRET", variable):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), f"{name}.{variable} must come from outside"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} would listen on all interfaces"
        assert not str(service.get("image", "")).endswith(":latest")
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
    environment = services["ray-head"]["environment"]
    made = services["buckets"]["command"][0]
    assert f"store/{environment['POLYTROPE_STORE'].removeprefix('s3://').partition('/')[0]}" in made
    assert "--artifacts-destination=s3://mlflow" in services["mlflow"]["entrypoint"]
    assert "store/mlflow" in made


# -- the image ---------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (INFRA / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_image_is_built_in_two_stages_runs_as_a_user_and_carries_no_caches() -> None:
    found = instructions()
    stages = [rest.partition(" AS ")[2] for word, rest in found if word == "FROM"]
    assert stages == ["build", "runtime"]
    bases = [rest for word, rest in found if word == "ARG"]
    assert all(re.search(r":\d", base) and ":latest" not in base for base in bases), "pinned images"
    last = found[max(number for number, (word, _) in enumerate(found) if word == "FROM") :]
    assert [rest for word, rest in last if word == "USER"] == ["polytrope"]
    assert any(f"--uid {USER}" in rest for _, rest in last)
    for word, rest in found:
        assert word != "ADD"
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
        if "pip install" in rest:
            assert all("--no-cache-dir" in part for part in rest.split("&&") if "pip install" in part)
            assert rest.count("--constraint constraints.txt") == rest.count("pip install")
        if word == "ENV":
            assert not re.search("TOKEN|PASSWORD|SECRET", rest)
    assert "nvidia/cuda" in bases[0]
    assert "-devel-" in bases[0]
    assert "-runtime-" in bases[1]
    assert any("build-ops" in rest for word, rest in found if word == "RUN"), "the kernels are built in the image"


def test_image_copies_what_the_package_is_built_from() -> None:
    copied = {
        source.rstrip("/")
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text()
    folders = set(re.findall(r'"polytrope\.[\w.]+" = "([\w/]+)"', project.partition("package-dir")[2].split("\n\n")[0]))
    for folder in folders:
        assert any(f"{source}/".startswith(f"{folder}/") or f"{folder}/".startswith(f"{source}/") for source in copied)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    sent = {
        line[1:] for line in (INFRA / "Containerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert sent == copied
    extras = re.search(r"--editable '\.\[([\w,]+)\]'", (INFRA / "Containerfile").read_text())
    assert extras is not None
    assert set(extras.group(1).split(",")) == {"s3", "mlflow_s3", "postgres"}, "what compose.yaml uses of it"


# -- Kubernetes --------------------------------------------------------------------------------------------------------


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kuberay" / f"{name}.yaml").read_text()))


def cluster_of(name: str) -> dict[str, Any]:
    document = documents(name)[0]
    return dict(document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"])


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_and_claims_follow_kubernetes_own_schemas(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    meta = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
    for pod in pods(cluster_of(name)):
        validate.validate({**meta, **pod}, "1.30", strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate({**meta, "spec": {**pod["spec"], "containers": [{"nam": "x"}]}}, "1.30", strict=True)
    for document in documents(name)[1:]:
        validate.validate(document, "1.30", strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_cluster_is_of_this_ray_and_its_pods_may_write_to_the_store(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == version_of("ray")
    claims = {document["metadata"]["name"] for file in MANIFESTS for document in documents(file)[1:]}
    for pod in pods(cluster):
        assert pod["spec"]["securityContext"]["fsGroup"] == USER
        assert {volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]} <= claims
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["volumeMounts"] == [{"name": "store", "mountPath": "/store"}]


def test_ray_reads_the_cluster_for_its_autoscaler() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    (document, *_) = documents("raycluster")
    document["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(document)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 8
    assert types["cpu"]["max_workers"] == 8


def test_entrypoint_of_the_job_is_a_command_that_resumes() -> None:
    (document, *_) = documents("rayjob")
    words = shlex.split(document["spec"]["entrypoint"])
    assert words[0] == "polytrope"
    options = build_parser().parse_args(words[1:])
    assert options.run_id, "without a name a retry would start anew"
    assert (options.store, options.ray_address) == ("/store", "auto")
    workers = cluster_of("rayjob")["workerGroupSpecs"]
    room = sum(group["replicas"] * int(_limits(group).get("nvidia.com/gpu", 0)) for group in workers)
    for name, stage in load_workflow(ROOT / options.workflow, []).stages.items():
        assert float(stage.resources.workers) * stage.resources.gpus <= room, name


def _limits(group: dict[str, Any]) -> dict[str, Any]:
    return dict(group["template"]["spec"]["containers"][0]["resources"]["limits"])


def an_object(required: str = "", **fields: Any) -> dict[str, Any]:
    """A schema: field → type, or the schema of what is in it."""
    inner = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in fields.items()}
    return {"type": "object", "properties": inner, "required": required.split()}


ANY_OBJECT = {"type": "object", "additionalProperties": True}
GROUP = {"rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}}, "template": ANY_OBJECT}
WORKERS = an_object(
    "groupName maxReplicas minReplicas template",
    groupName="string", replicas="integer", minReplicas="integer", maxReplicas="integer", numOfHosts="integer", **GROUP,
)  # fmt: skip
CLUSTER = an_object(
    "headGroupSpec",
    rayVersion="string", enableInTreeAutoscaling="boolean", suspend="boolean", authOptions=an_object(mode="string"),
    autoscalerOptions=an_object(idleTimeoutSeconds="integer", upscalingMode="string"),
    headGroupSpec=an_object("template", serviceType="string", **GROUP),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)  # fmt: skip
JOB = an_object(
    entrypoint="string", entrypointNumCpus="number", entrypointNumGpus="number", backoffLimit="integer",
    activeDeadlineSeconds="integer", shutdownAfterJobFinishes="boolean", ttlSecondsAfterFinished="integer",
    submissionMode="string", suspend="boolean", runtimeEnvYAML="string", rayClusterSpec=CLUSTER,
)  # fmt: skip


def kuberays_schema(kind: str, version: str) -> dict[str, Any]:
    """KubeRay's own where a checkout is named, else that of the fields above."""
    place = os.environ.get("POLYTROPE_KUBERAY_CRDS")
    if not place:
        assert version == "ray.io/v1"
        spec = {"RayCluster": CLUSTER, "RayJob": JOB}[kind]
        return an_object("spec", apiVersion="string", kind="string", metadata=ANY_OBJECT, spec=spec)
    definition = yaml.safe_load((Path(place) / f"ray.io_{kind.lower()}s.yaml").read_text())
    (found,) = (item for item in definition["spec"]["versions"] if version == f"ray.io/{item['name']}")
    return dict(found["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_follows_kuberays_schema(name: str) -> None:
    document = documents(name)[0]
    schema = kuberays_schema(document["kind"], document["apiVersion"])
    problems: list[str] = []
    compare(schema, document, document["kind"], problems)
    assert problems == []
    document["spec"]["rayVersoin"] = 1
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    del cluster["workerGroupSpecs"][0]["minReplicas"]
    cluster["rayVersion"] = 2.6
    compare(schema, document, document["kind"], problems)
    assert sorted(problem.rpartition(".")[2] for problem in problems) == [
        "minReplicas: is missing", "rayVersion: is no string", "rayVersoin: is unknown",
    ]  # fmt: skip


def compare(schema: dict[str, Any], value: Any, path: str, problems: list[str]) -> None:
    """What Kubernetes' API server checks with server-side field validation: types, required and unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = types.get(schema.get("type", ""))
    if kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        problems.append(f"{path}: is no {schema['type']}")
    elif isinstance(value, dict):
        problems += [f"{path}.{name}: is missing" for name in schema.get("required", []) if name not in value]
        inner, others = schema.get("properties"), schema.get("additionalProperties")
        for name, item in value.items():
            if inner and name in inner:
                compare(inner[name], item, f"{path}.{name}", problems)
            elif isinstance(others, dict):
                compare(others, item, f"{path}.{name}", problems)
            elif inner and not schema.get("x-kubernetes-preserve-unknown-fields"):
                problems.append(f"{path}.{name}: is unknown")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            compare(schema.get("items", {}), item, f"{path}[{number}]", problems)
    elif "enum" in schema and value not in schema["enum"]:
        problems.append(f"{path}: {value!r} is none of {schema['enum']}")


# -- Slurm -------------------------------------------------------------------------------------------------------------


def test_slurm_script_is_clean_shell() -> None:
    script = INFRA / "slurm" / "polytrope.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("Debian package `shellcheck` is not installed")
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


SRUN = """#!/usr/bin/env bash
# one step of the allocation: the command behind the options, on this machine
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""


@pytest.mark.timeout(200)
def test_slurm_script_starts_a_cluster_and_runs_the_workflow(tmp_path: Path) -> None:
    """Slurm's two commands stand for an allocation of two nodes, both this machine; Ray, driver and store are real."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "scontrol").write_text('#!/usr/bin/env bash\n[ "$1" = show ] && printf "node1\\nnode2\\n"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "POLYTROPE_STORE": str(tmp_path / "store"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = ["bash", str(INFRA / "slurm" / "polytrope.sbatch"), "workflows/word-count.yaml", "mine"]
    # in a process namespace of its own, which ends with the script as an allocation does
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("process namespaces need root")
    ended = subprocess.run(
        [*alone, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "run mine succeeded" in ended.stdout
    assert "ray executor" in ended.stdout
