"""The files that deploy the service agree with the code they name."""

from importlib import import_module
from pathlib import Path

import yaml

from cartridges.config import BuildSettings
from cartridges.serve_config import ReplicaSettings
from workflows.serving import deployments, replicas

FILE = Path(__file__).resolve().parents[1] / "workflows" / "configs" / "serve.yaml"


def test_serve_yaml_names_what_there_is():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(FILE.read_text())
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        module, _, function = application["import_path"].partition(":")
        assert callable(vars(import_module(module))[function])
        BuildSettings.model_validate(application["args"]["settings"])
        ReplicaSettings.model_validate(application["args"].get("replicas", {}))
    assert config["applications"][1]["name"].startswith(replicas.DEDICATED)


def test_the_applications_bind():
    app = deployments.build_app({"registry": "r", "settings": {"serve": {"drain_s": 3}}})
    assert app._bound_deployment.name == "ingress"
    assert replicas.build_dedicated({"registry": "r"})._bound_deployment.name == "engine"
