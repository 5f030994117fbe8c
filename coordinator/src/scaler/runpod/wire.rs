//! What RunPod's REST v2 says and is told, as far as it is used. Fields of answers that are not known are passed over, and so
//! are values of an environment that are not the scaler's own: they may be secrets.

use std::collections::BTreeMap;
use std::fmt;

use espalier_core::time::Timestamp;
use espalier_runtime::config::Secret;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::config::Cloud;

/// The variable that says which scaler made a pod.
pub const SCALER_VARIABLE: &str = "ESPALIER_SCALER";
/// The variable that says for which of its pools.
pub const POOL_VARIABLE: &str = "ESPALIER_POOL";

/// A pod.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// RunPod's name for it.
    pub id: String,
    /// Ours; people can change it.
    pub name: String,
    /// How it is.
    pub status: PodStatus,
    /// Its GPUs; a pod without has none.
    #[serde(default)]
    pub gpu: Option<PodGpu>,
    /// $ an hour, now: 0 where it has ended.
    #[serde(default)]
    pub cost: f64,
    /// When it was made, by RunPod's clock.
    #[serde(deserialize_with = "timestamp")]
    pub created_at: Timestamp,
    /// What it was told by a scaler.
    #[serde(default, rename = "env", deserialize_with = "marks")]
    pub marks: Marks,
}

impl Pod {
    /// Whether it is of the scaler `name`.
    pub fn is_of(&self, name: &str) -> bool {
        self.marks.scaler == name && !self.marks.scaler.is_empty()
    }
}

/// The GPUs of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct PodGpu {
    /// Their type.
    pub id: String,
    /// How many.
    #[serde(default = "one")]
    pub count: u32,
}

fn one() -> u32 {
    1
}

/// What the scaler writes into a pod's environment, and finds there again. Empty where a pod is somebody else's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Marks {
    /// Name of the scaler.
    #[serde(rename = "ESPALIER_SCALER")]
    pub scaler: String,
    /// Name of its pool.
    #[serde(rename = "ESPALIER_POOL")]
    pub pool: String,
    /// Name of the instance, which is the pod's own until somebody changes that.
    #[serde(rename = "ESPALIER_INSTANCE")]
    pub instance: String,
}

fn marks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Marks, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn timestamp<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
    let text = String::deserialize(deserializer)?;
    Timestamp::parse(&text).ok_or_else(|| {
        serde::de::Error::custom("`createdAt` must be a time such as 2026-03-13T20:00:00Z")
    })
}

/// How a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodStatus {
    /// It is being allocated.
    Provisioning,
    /// Its container starts.
    Starting,
    /// Its container runs.
    Running,
    /// Its container has ended; the pod is kept, and what it stores costs.
    Exited,
    /// It will not run.
    Error,
    /// It is gone.
    Terminated,
    /// What RunPod has come to say since.
    Other(String),
}

impl<'de> Deserialize<'de> for PodStatus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok(match text.as_str() {
            "PROVISIONING" => Self::Provisioning,
            "STARTING" => Self::Starting,
            "RUNNING" => Self::Running,
            "EXITED" => Self::Exited,
            "ERROR" => Self::Error,
            "TERMINATED" => Self::Terminated,
            _ => Self::Other(text),
        })
    }
}

impl fmt::Display for PodStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Provisioning => "provisioning",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Error => "error",
            Self::Terminated => "terminated",
            Self::Other(text) => text,
        })
    }
}

/// The answer to a question for pods. There are no pages: it has all.
#[derive(Debug, Deserialize)]
pub(super) struct Pods {
    pub pods: Vec<Pod>,
}

/// A pod to be made.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NewPod {
    /// Its name.
    pub name: String,
    /// The image, unless a template has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// A template of the account, or a public one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_id: Option<String>,
    /// Arguments of the image's entrypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<String>,
    /// GB of the container's own disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<u32>,
    /// Ports that can be reached, such as `8000/http`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
    /// Its environment.
    #[serde(serialize_with = "expose")]
    pub env: BTreeMap<String, Secret>,
    /// Id of the credentials for a private registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// Whose machines.
    pub cloud: Cloud,
    /// Data centers to choose from; none: any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data_center_ids: Vec<String>,
    /// Its GPUs.
    pub gpu: NewGpu,
    /// What is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounts: Option<Mounts>,
    /// Whether RunPod puts the account's SSH keys into it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub start_ssh: bool,
}

/// The one place where the values of an environment leave the process.
fn expose<S: Serializer>(env: &BTreeMap<String, Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(env.iter().map(|(name, value)| (name, value.expose())))
}

/// GPUs to be had.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NewGpu {
    /// Their type.
    pub id: String,
    /// How many.
    pub count: u32,
    /// Lowest CUDA version of the machine's driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_cuda_version: Option<String>,
}

/// What is mounted: one of the two.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Mounts {
    /// A disk of the pod's machine, which goes with the pod.
    Persistent(PersistentMount),
    /// Network volumes, of which there may be one.
    Network([NetworkMount; 1]),
}

/// A disk of the machine.
#[derive(Clone, Debug, Serialize)]
pub struct PersistentMount {
    /// GB.
    pub size: u32,
    /// Where.
    pub path: String,
}

/// A network volume.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkMount {
    /// Its id.
    pub volume_id: String,
    /// Where.
    pub path: String,
}

/// A type of GPU in the catalogue.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuType {
    /// What a pod asks for.
    pub id: String,
    /// GB of memory.
    #[serde(default)]
    pub memory: u32,
    /// Whether there are any in the secure cloud.
    #[serde(default)]
    pub secure: bool,
    /// Whether there are any in the community cloud.
    #[serde(default)]
    pub community: bool,
    /// $ an hour of one.
    pub price: PerCloud<f64>,
    /// Most of them in one pod.
    pub max_count: PerCloud<u32>,
    /// How many there are now.
    #[serde(default)]
    pub availability: Availability,
}

impl GpuType {
    /// Whether `cloud` has such GPUs at all.
    pub fn is_in(&self, cloud: Cloud) -> bool {
        match cloud {
            Cloud::Secure => self.secure,
            Cloud::Community => self.community,
        }
    }
}

/// A figure for each cloud.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct PerCloud<T> {
    /// Of RunPod's own data centers.
    pub secure: T,
    /// Of machines of others.
    pub community: T,
}

impl<T: Copy> PerCloud<T> {
    /// That of `cloud`.
    pub fn of(self, cloud: Cloud) -> T {
        match cloud {
            Cloud::Secure => self.secure,
            Cloud::Community => self.community,
        }
    }
}

/// How much there is of a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Availability {
    /// Nothing.
    None,
    /// Something, or nobody knows: it is worth a try.
    #[default]
    Some,
}

impl<'de> Deserialize<'de> for Availability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let level = String::deserialize(deserializer)?;
        Ok(match level.as_str() {
            "NONE" => Self::None,
            _ => Self::Some,
        })
    }
}

/// The answer to a question for GPUs.
#[derive(Debug, Deserialize)]
pub(super) struct GpuTypes {
    pub gpus: Vec<GpuType>,
}

/// What is said with a refusal, after RFC 9457.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Problem {
    pub title: String,
    pub detail: String,
    pub errors: Vec<String>,
}

impl Problem {
    /// In one line.
    pub fn says(&self) -> String {
        let detail = match self.detail.is_empty() {
            true => &self.title,
            false => &self.detail,
        };
        let all = std::iter::once(detail).chain(&self.errors);
        let all: Vec<&str> = all.map(|text| text.trim_end_matches('.')).collect();
        all.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_to_us_is_passed_over() {
        let text = r#"{
            "id": "a", "name": "b", "status": "MIGRATING", "cost": 0.5, "createdAt": "2026-06-01T12:00:00Z",
            "gpu": {"id": "NVIDIA L4", "vendor": "x"}, "color": "blue",
            "env": {"ESPALIER_SCALER": "s", "ESPALIER_INSTANCE": "i", "TOKEN": "hunter2"}
        }"#;
        let pod: Pod = serde_json::from_str(text).unwrap();
        assert_eq!(pod.status, PodStatus::Other("MIGRATING".to_owned()));
        assert_eq!(
            (pod.gpu.as_ref().unwrap().count, pod.marks.pool.as_str()),
            (1, "")
        );
        assert!(pod.is_of("s"));
        assert!(!format!("{pod:?}").contains("hunter2"));
        let bare = r#"{"id": "a", "name": "b", "status": "RUNNING", "createdAt": "2026-06-01T12:00:00Z", "env": null}"#;
        let pod: Pod = serde_json::from_str(bare).unwrap();
        assert!(!pod.is_of(""));
        let error = serde_json::from_str::<Pod>(&bare.replace("T12", " 12 o'clock")).unwrap_err();
        assert!(
            error.to_string().contains("`createdAt` must be a time"),
            "{error}"
        );
    }

    #[test]
    fn a_problem_is_one_line() {
        let read = |text: &str| serde_json::from_str::<Problem>(text).unwrap().says();
        assert_eq!(
            read(r#"{"title": "Not Found", "status": 404, "detail": "pod not found"}"#),
            "pod not found"
        );
        assert_eq!(
            read(r#"{"title": "T", "detail": "Failed.", "errors": ["$.a: x", "$.b: y"]}"#),
            "Failed; $.a: x; $.b: y"
        );
        assert_eq!(read(r#"{"title": "T"}"#), "T");
    }
}
