"""Rules of safety, and that what objects name is there."""

from dataclasses import dataclass

WORKLOADS = {"Deployment", "ScaledJob"}
REDIS_PORTS = {6379, 26379}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@dataclass
class Pod:
    """The pods of a workload."""

    where: str
    component: str
    labels: dict
    spec: dict

    @property
    def containers(self):
        return self.spec.get("containers", []) + self.spec.get("initContainers", [])


def pods(things):
    for thing in things:
        if thing["kind"] not in WORKLOADS:
            continue
        spec = thing["spec"]
        template = (spec["jobTargetRef"] if thing["kind"] == "ScaledJob" else spec)["template"]
        labels = template["metadata"]["labels"]
        component = labels["app.kubernetes.io/component"]
        yield Pod(f"{thing['kind']} {thing['metadata']['name']}", component, labels, template["spec"])


def expect(found, where, holds, rule):
    if not holds:
        found.append(f"{where}: {rule}")


def pod_faults(pod):
    found, spec = [], pod.spec
    security = spec.get("securityContext", {})
    rules = [
        (security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0, "must not run as root"),
        (security.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"), "must have a seccomp profile"),
        (spec.get("automountServiceAccountToken") is False, "must have no token of the Kubernetes API"),
        (spec.get("enableServiceLinks") is False, "must have no variables of Services: ESPALIER_COORDINATOR_… is ours"),
        (not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")), "must not be in the host's namespaces"),
        (not any("hostPath" in volume for volume in spec["volumes"]), "must have no folder of the host"),
    ]
    for holds, rule in rules:
        expect(found, pod.where, holds, rule)
    for volume in spec["volumes"]:
        bounded = "emptyDir" not in volume or (volume["emptyDir"] or {}).get("sizeLimit")
        expect(found, pod.where, bounded, f"volume {volume['name']} must have a sizeLimit")
    for container in pod.containers:
        found += container_faults(pod, container)
    return found


def container_faults(pod, container):
    found, where = [], f"{pod.where}, container {container['name']}"
    security = container.get("securityContext", {})
    capabilities = security.get("capabilities", {})
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    image = container["image"]
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    rules = [
        (not security.get("privileged"), "must not be privileged"),
        (security.get("allowPrivilegeEscalation") is False, "must not gain privileges"),
        (security.get("readOnlyRootFilesystem") is True, "must not write into its image"),
        (capabilities.get("drop") == ["ALL"] and not capabilities.get("add"), "must have no capabilities"),
        ("memory" in limits, "must have a limit of memory"),
        ("cpu" in requests and "memory" in requests, "must request cores and memory"),
        (all(name in container for name in PROBES), "must have probes"),
        ("@sha256:" in image or (tag and tag != "latest"), "must have an image of one version"),
    ]
    for holds, rule in rules:
        expect(found, where, holds, rule)
    ports = {key: port for port in container.get("ports", []) for key in (port["name"], port["containerPort"])}
    for name in PROBES:
        probe = container.get(name, {})
        asked = [probe[how]["port"] for how in ("grpc", "httpGet", "tcpSocket") if how in probe]
        expect(found, where, set(asked) <= set(ports), f"{name} asks port {asked}, which it has not")
    mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
    volumes = {volume["name"] for volume in pod.spec["volumes"]}
    expect(found, where, mounted == volumes, f"mounts {sorted(mounted)}, but the volumes are {sorted(volumes)}")
    variables = [variable["name"] for variable in container.get("env", [])]
    expect(found, where, len(variables) == len(set(variables)), "must set a variable once")
    return found


def reference_faults(things):
    """What is named by a name or by labels has to be there."""
    found = []
    named = {(thing["kind"], thing["metadata"]["name"]) for thing in things}
    all_pods = list(pods(things))
    expect(found, "release", len(named) == len(things), "must have each name once")
    expect(found, "release", not any(kind == "Secret" for kind, _ in named), "must make no Secret: users bring them")
    for pod in all_pods:
        account = ("ServiceAccount", pod.spec["serviceAccountName"])
        expect(found, pod.where, account in named, f"{account[1]} is no ServiceAccount of the release")
        for volume in pod.spec["volumes"]:
            name = volume.get("configMap", {}).get("name")
            expect(found, pod.where, not name or ("ConfigMap", name) in named, f"{name} is no ConfigMap of the release")
    for thing in things:
        kind, name, spec = thing["kind"], thing["metadata"]["name"], thing.get("spec", {})
        where = f"{kind} {name}"
        if kind == "ServiceAccount":
            expect(found, where, thing.get("automountServiceAccountToken") is False, "must not be mounted")
        if kind == "ScaledObject":
            target = ("Deployment", spec["scaleTargetRef"]["name"])
            expect(found, where, target in named, f"{target[1]} is no Deployment of the release")
        if kind in ("ScaledObject", "ScaledJob"):
            for trigger in spec["triggers"]:
                service = trigger["metadata"]["scalerAddress"].split(".")[0]
                expect(found, where, ("Service", service) in named, f"{service} is no Service of the release")
        if kind in ("Service", "PodDisruptionBudget", "PodMonitor", "Deployment"):
            found += selector_faults(thing, where, all_pods)
    return found


def selector_faults(thing, where, all_pods):
    found, spec = [], thing["spec"]
    selector = spec["selector"] if thing["kind"] == "Service" else spec["selector"]["matchLabels"]
    chosen = [pod for pod in all_pods if selector.items() <= pod.labels.items()]
    expect(found, where, len(chosen) == 1, f"must choose the pods of one workload, chooses {len(chosen)}")
    ports = {port["name"] for pod in chosen for container in pod.containers for port in container.get("ports", [])}
    wanted = [port["targetPort"] for port in spec.get("ports", [])]
    wanted += [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", [])]
    for port in wanted:
        expect(found, where, port in ports, f"port {port} is none of the pods'")
    return found


def network_faults(things):
    found = []
    policies = [thing for thing in things if thing["kind"] == "NetworkPolicy"]
    if not policies:
        return found
    for pod in pods(things):
        mine = [p for p in policies if p["spec"]["podSelector"].get("matchLabels", {}).items() <= pod.labels.items()]
        closed = any(
            set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"} and not {"ingress", "egress"} & set(p["spec"])
            for p in mine
        )
        expect(found, pod.where, closed, "must be denied what no policy allows")
        for policy in mine:
            for rule in policy["spec"].get("egress", []) + policy["spec"].get("ingress", []):
                ports = {port["port"] for port in rule.get("ports", [])}
                where = f"NetworkPolicy {policy['metadata']['name']}"
                expect(found, where, ports, "must name the ports of each rule")
                reaches = pod.component != "coordinator" and ports & REDIS_PORTS
                expect(found, where, not reaches, f"must not let {pod.component} reach Redis")
    return found


def faults(things):
    found = [fault for pod in pods(things) for fault in pod_faults(pod)]
    return found + reference_faults(things) + network_faults(things)


def first(things, kind, component=None):
    for thing in things:
        labels = thing["metadata"]["labels"]
        if thing["kind"] == kind and component in (None, labels["app.kubernetes.io/component"]):
            return thing
    raise LookupError(f"no {kind} of {component}")


def in_pod(change):
    return lambda things: change(next(pods(things)).spec)


def in_container(change):
    return in_pod(lambda spec: change(spec["containers"][0]))


def in_config(old, new):
    """Spoils the coordinator's configuration."""

    def spoil(things):
        data = first(things, "ConfigMap", "coordinator")["data"]
        data["coordinator.toml"] = data["coordinator.toml"].replace(old, new)

    return spoil


def reach_redis(things):
    policy = first(things, "NetworkPolicy", "agent-worker")["spec"]
    policy["egress"].append({"ports": [{"port": 6379, "protocol": "TCP"}]})


def job(things):
    return first(things, "ScaledJob")["spec"]["jobTargetRef"]


# What each rule is for, done to a good release, and a word of the fault that has to be found.
SPOILT = [
    ("root", in_pod(lambda s: s["securityContext"].update(runAsUser=0)), "as root"),
    ("no seccomp", in_pod(lambda s: s["securityContext"].pop("seccompProfile")), "seccomp"),
    ("a token", in_pod(lambda s: s.update(automountServiceAccountToken=True)), "no token"),
    ("service links", in_pod(lambda s: s.pop("enableServiceLinks")), "variables of Services"),
    ("the host's network", in_pod(lambda s: s.update(hostNetwork=True)), "host's namespaces"),
    ("a folder of the host", in_pod(lambda s: s["volumes"].append({"name": "h", "hostPath": {"path": "/"}})), "folder of the host"),
    ("no time to end", in_pod(lambda s: s.pop("terminationGracePeriodSeconds")), "has 30 s to end"),
    ("a folder without bound", in_pod(lambda s: s["volumes"].append({"name": "e", "emptyDir": {}})), "sizeLimit"),
    ("privilege", in_container(lambda c: c["securityContext"].update(privileged=True)), "privileged"),
    ("escalation", in_container(lambda c: c["securityContext"].pop("allowPrivilegeEscalation")), "gain privileges"),
    ("a writable image", in_container(lambda c: c["securityContext"].pop("readOnlyRootFilesystem")), "write into its image"),
    ("capabilities", in_container(lambda c: c["securityContext"].update(capabilities={"add": ["SYS_ADMIN"]})), "capabilities"),
    ("no limit", in_container(lambda c: c["resources"]["limits"].pop("memory")), "limit of memory"),
    ("no request", in_container(lambda c: c["resources"]["requests"].pop("cpu")), "request cores"),
    ("no probe", in_container(lambda c: c.pop("livenessProbe")), "must have probes"),
    ("a probe of another port", lambda t: first(t, "Deployment", "agent-worker")["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"].update(port=1), "asks port"),
    ("latest", in_container(lambda c: c.update(image="registry.example/x:latest")), "one version"),
    ("a misspelt field", in_container(lambda c: c.update(argz=[])), "argz"),
    ("an unknown option", in_container(lambda c: c["args"].append("--no-such")), "--no-such"),
    ("an unknown variable", in_container(lambda c: c["env"].append({"name": "ESPALIER_NO_SUCH", "value": "1"})), "ESPALIER_NO_SUCH"),
    ("a key that nobody knows", in_config("queue_acknowledge", "queue_acknowlege"), "queue_acknowlege"),
    ("a file that is no TOML", in_config("listen =", "listen"), "is no TOML"),
    ("a way to Redis", reach_redis, "reach Redis"),
    ("a policy that is open", lambda t: first(t, "NetworkPolicy", "default-deny")["spec"].update(egress=[{}]), "must be denied"),
    ("a misspelt field of KEDA", lambda t: first(t, "ScaledObject")["spec"].update(cooldown=1), "cooldown"),
    ("a misspelt field in a job", lambda t: job(t).update(backofLimit=1), "backofLimit"),
    ("a port that is not there", lambda t: first(t, "Service", "coordinator")["spec"]["ports"][0].update(targetPort="x"), "port x"),
    ("a misspelt field of Prometheus", lambda t: first(t, "PodMonitor")["spec"].update(endpoints=[]), "endpoints"),
    ("a misspelt field of an alert", lambda t: first(t, "PrometheusRule")["spec"]["groups"][0]["rules"][0].update(fro="1m"), "fro"),
    ("too little time to checkpoint", lambda t: job(t)["template"]["spec"].update(terminationGracePeriodSeconds=60), "needs"),
]
