//! What the account has: types of GPU, and pods that come to run, cost, and end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Seen, State};
use crate::process::Process;

/// A type of GPU.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub id: &'static str,
    pub memory: u64,
    /// $ an hour.
    pub secure: f64,
    pub community: f64,
    /// What the catalogue says.
    pub availability: &'static str,
    /// How many pods can be created.
    pub left: usize,
}

/// GPUs that one pod may have.
const GPUS_MAX: u64 = 8;

/// What there is at the start.
pub fn catalogue() -> Vec<Gpu> {
    let gpu = |id, memory, secure, community| Gpu {
        id,
        memory,
        secure,
        community,
        availability: "HIGH",
        left: usize::MAX,
    };
    vec![
        gpu("NVIDIA RTX A5000", 24, 0.27, 0.16),
        gpu("NVIDIA L4", 24, 0.39, 0.31),
        gpu("NVIDIA H100 80GB HBM3", 80, 2.99, 2.69),
    ]
}

impl Gpu {
    /// As the catalogue has it.
    pub fn to_json(&self, with_availability: bool) -> Value {
        let mut gpu = json!({
            "id": self.id, "name": self.id.trim_start_matches("NVIDIA "), "pool": null, "manufacturer": "NVIDIA",
            "memory": self.memory, "secure": true, "community": true,
            "price": {"secure": self.secure, "community": self.community},
            "maxCount": {"secure": GPUS_MAX, "community": GPUS_MAX},
        });
        if with_availability {
            gpu["availability"] = json!(self.availability);
        }
        gpu
    }

    fn price(&self, cloud: &str) -> f64 {
        match cloud {
            "COMMUNITY" => self.community,
            _ => self.secure,
        }
    }
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    id: String,
    /// As it was asked for.
    request: Value,
    cost: f64,
    created: Instant,
    created_at: String,
    provisioning: Duration,
    status: Option<&'static str>,
    /// Lists that it is missing from.
    pub unlisted: usize,
    /// Where its image is one.
    process: Option<Process>,
}

impl Pod {
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn name(&self) -> &str {
        self.request["name"].as_str().unwrap_or_default()
    }

    pub fn set_status(&mut self, status: &'static str) {
        self.status = Some(status);
    }

    fn status(&mut self) -> &'static str {
        if let Some(status) = self.status {
            return status;
        }
        if self
            .process
            .as_mut()
            .is_some_and(|process| process.ended().is_some())
        {
            return "EXITED";
        }
        let age = self.created.elapsed();
        match (age >= self.provisioning, age * 2 >= self.provisioning) {
            (true, _) => "RUNNING",
            (false, true) => "STARTING",
            (false, false) => "PROVISIONING",
        }
    }

    pub fn seen(&mut self) -> Seen {
        Seen {
            status: self.status().to_owned(),
            id: self.id.clone(),
            name: self.name().to_owned(),
            request: self.request.clone(),
            cost: self.cost,
        }
    }

    /// As RunPod tells of it.
    pub fn shown(&mut self) -> Value {
        let status = self.status();
        self.as_of(status)
    }

    /// As RunPod answers its creation: nothing has begun yet.
    pub fn to_json_new(&self) -> Value {
        self.as_of("PROVISIONING")
    }

    fn as_of(&self, status: &str) -> Value {
        let asked = |field: &str, otherwise: Value| match &self.request[field] {
            Value::Null => otherwise,
            value => value.clone(),
        };
        let costs = !matches!(status, "EXITED" | "TERMINATED");
        let gpu = &self.request["gpu"];
        let began = (status == "RUNNING").then(|| self.created_at.clone());
        json!({
            "id": self.id, "name": self.name(), "status": status,
            "actions": ["terminate"],
            "image": asked("image", json!("")), "args": asked("args", json!("")),
            "disk": asked("disk", json!(20)), "mounts": asked("mounts", json!({})),
            "ports": asked("ports", json!([])), "env": asked("env", json!({})),
            "registry": self.request["registry"], "cloud": asked("cloud", json!("SECURE")),
            "gpu": {"id": gpu["id"], "count": gpu["count"].as_u64().unwrap_or(1)},
            "dataCenterId": "US-KS-2", "cudaVersion": "12.8",
            "ssh": {"proxy": null, "direct": null}, "template": null,
            "cost": if costs { self.cost } else { 0.0 },
            "locked": false, "globalNetworking": {"enabled": false},
            "runtime": if began.is_some() { json!({"uptime": self.created.elapsed().as_secs()}) } else { Value::Null },
            "createdAt": self.created_at, "startedAt": began,
        })
    }
}

impl State {
    /// Makes a pod of a request that the description allows.
    ///
    /// # Errors
    /// Status and words of a refusal.
    pub fn create(&mut self, request: &Value, folder: &TempDir) -> Result<&Pod, (u16, String)> {
        let refused = |detail: &str| Err((400, detail.to_owned()));
        let compute = (request.get("gpu").is_some(), request.get("cpu").is_some());
        if !matches!(compute, (true, false)) {
            return refused("exactly one of gpu or cpu must be set; this account has no CPU pods");
        }
        let mounts = &request["mounts"];
        if mounts.get("persistent").is_some() && mounts.get("network").is_some() {
            return refused("mounts.persistent and mounts.network are mutually exclusive");
        }
        let asked = &request["gpu"];
        let allowed = asked["allowedCudaVersions"].as_array();
        if asked.get("minCudaVersion").is_some() && allowed.is_some_and(|all| !all.is_empty()) {
            return refused("allowedCudaVersions and minCudaVersion are mutually exclusive");
        }
        if request.get("templateId").is_some() {
            return Err((404, "template not found".to_owned()));
        }
        let count = asked["count"].as_u64().unwrap_or(1);
        let cloud = request["cloud"].as_str().unwrap_or("SECURE");
        let gpu = self.gpus.iter_mut().find(|gpu| asked["id"] == gpu.id);
        let Some(gpu) = gpu.filter(|_| count <= GPUS_MAX) else {
            return refused("there is no machine with such GPUs");
        };
        if gpu.left == 0 {
            return refused(
                "There are no instances currently available with the requested specifications",
            );
        }
        gpu.left -= 1;
        let cost = gpu.price(cloud) * count as f64;
        self.made += 1;
        let mut pod = Pod {
            id: format!("pod{:07}", self.made),
            request: request.clone(),
            cost,
            created: Instant::now(),
            created_at: now(),
            provisioning: self.provisioning,
            status: None,
            unlisted: self.unlisted,
            process: None,
        };
        pod.process = self.process(&pod, folder);
        self.pods.push(pod);
        Ok(&self.pods[self.pods.len() - 1])
    }

    /// The process that a pod's image is.
    fn process(&self, pod: &Pod, folder: &TempDir) -> Option<Process> {
        let image = self.images.get(pod.request["image"].as_str()?)?;
        let variables = pod.request["env"].as_object().into_iter().flatten();
        let variables = variables.map(|(name, value)| {
            let value = value.as_str().unwrap_or_default();
            (name.clone(), value.to_owned())
        });
        let mut environment: BTreeMap<String, String> = variables.collect();
        environment.insert("RUNPOD_POD_ID".to_owned(), pod.id.clone());
        let mut command = image(&environment);
        command.envs(&environment);
        Some(Process::start(&pod.id, command, folder.path()))
    }
}

/// The time of day, as RunPod writes it.
#[expect(
    clippy::disallowed_methods,
    reason = "RunPod's clock is its own, and this is its stand-in"
)]
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = since.expect("a time after 1970").as_secs();
    let time = chrono::DateTime::from_timestamp(seconds.cast_signed(), 0);
    let time = time.expect("a time of this millennium");
    time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}
