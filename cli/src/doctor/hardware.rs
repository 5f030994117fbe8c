//! What models can run on here: the CPU, NVIDIA's libraries, and GPUs. A machine without a GPU lacks nothing: its CPU
//! serves and trains.

use espalier_infer_worker::serve::{DTYPE_AUTO, DeviceFound, Library, Survey};

use super::Finding;
use crate::hardware;

/// Looks at all of it.
pub async fn findings() -> Vec<Finding> {
    match hardware::look().await {
        Ok(found) => shown(&found),
        Err(text) => vec![Finding::fail("hardware", text, hardware::FIX)],
    }
}

fn shown(found: &Survey) -> Vec<Finding> {
    let mut findings = vec![cpu(found)];
    findings.extend(found.libraries.iter().map(library));
    match &found.gpus {
        Some(Ok(gpus)) => {
            findings.push(cudnn(&found.cudnn));
            findings.extend(gpus.iter().map(gpu));
        }
        Some(Err(reason)) => findings.push(Finding::warn(
            "GPU",
            reason,
            "start the container with the GPU, or look with `nvidia-smi`",
        )),
        None => {}
    }
    findings.push(serving(found));
    findings.push(training(found));
    findings
}

fn cpu(found: &Survey) -> Finding {
    let seen = format!(
        "{} kernels, {} cores, {:.1} GiB of memory free",
        found.instructions,
        found.threads,
        gib(found.memory_bytes)
    );
    match found.has_vectors {
        true => Finding::ok("CPU", seen),
        false => Finding::warn(
            "CPU",
            seen,
            "serve models on a machine with AVX2, or with a GPU",
        ),
    }
}

fn library(library: &Library) -> Finding {
    match &library.missing {
        None => present(library),
        Some(missing) => {
            let (seen, fix) = reason_and_remedy(missing);
            Finding::warn(library.name, seen, format!("for GPUs only: {fix}"))
        }
    }
}

/// Asked for only where a GPU is: models are served without it.
fn cudnn(library: &Library) -> Finding {
    match &library.missing {
        None => present(library),
        Some(missing) => {
            let (seen, fix) = reason_and_remedy(missing);
            Finding::warn(library.name, seen, format!("for faster training: {fix}"))
        }
    }
}

fn present(library: &Library) -> Finding {
    let version = library.version.as_deref().unwrap_or("of unknown version");
    let path = library.path.as_ref().map(|path| path.display().to_string());
    Finding::ok(
        library.name,
        [Some(version.to_owned()), path]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(" at "),
    )
}

fn gpu(gpu: &DeviceFound) -> Finding {
    let (major, minor) = gpu.capability;
    Finding::ok(
        format!("cuda:{}", gpu.ordinal),
        format!(
            "{}, compute capability {major}.{minor}, {:.1} GiB",
            gpu.name,
            gib(gpu.memory_bytes as u64)
        ),
    )
}

/// The two halves of an error about hardware: what is wrong, and what brings what is missing.
fn reason_and_remedy(error: &str) -> (&str, &str) {
    error.rsplit_once(": ").unwrap_or((error, ""))
}

/// What a model would run on that is started without being told.
fn serving(found: &Survey) -> Finding {
    let seen = match &found.auto {
        Ok(gpu) => format!(
            "`--device auto` is cuda:{}, `--dtype auto` {DTYPE_AUTO}",
            gpu.ordinal
        ),
        Err(error) => format!(
            "`--device auto` is the CPU ({}), `--dtype auto` {DTYPE_AUTO}; q8 is faster, with other numbers",
            reason_and_remedy(error).0
        ),
    };
    Finding::ok("model serving", seen)
}

/// What a train worker would run on that is started without being told.
fn training(found: &Survey) -> Finding {
    let seen = match &found.auto {
        Ok(gpu) => format!("`--device auto` is cuda:{}, in bf16", gpu.ordinal),
        Err(error) => format!(
            "`--device auto` is the CPU ({}), in f32",
            reason_and_remedy(error).0
        ),
    };
    Finding::ok("training", seen)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn found(name: &'static str) -> Library {
        Library {
            name,
            version: Some("13.0".to_owned()),
            path: Some(format!("/lib/{name}.so.13").into()),
            missing: None,
        }
    }

    fn device(name: &str) -> DeviceFound {
        DeviceFound {
            ordinal: 0,
            name: name.to_owned(),
            capability: (9, 0),
            memory_bytes: 141 << 30,
        }
    }

    fn machine() -> Survey {
        Survey {
            instructions: "avx512",
            has_vectors: true,
            threads: 16,
            memory_bytes: 3 << 29,
            libraries: ["libcuda", "NVRTC", "cuBLASLt"].map(found),
            cudnn: found("cuDNN"),
            gpus: Some(Ok(vec![device("H200")])),
            auto: Ok(device("H200")),
            usable: vec![device("H200")],
        }
    }

    #[test]
    fn a_machine_with_a_gpu() {
        let findings = shown(&machine());
        let seen: Vec<&str> = findings.iter().map(|finding| &*finding.seen).collect();
        let expected = [
            "avx512 kernels, 16 cores, 1.5 GiB of memory free",
            "13.0 at /lib/libcuda.so.13",
            "13.0 at /lib/NVRTC.so.13",
            "13.0 at /lib/cuBLASLt.so.13",
            "13.0 at /lib/cuDNN.so.13",
            "H200, compute capability 9.0, 141.0 GiB",
            "`--device auto` is cuda:0, `--dtype auto` bf16",
            "`--device auto` is cuda:0, in bf16",
        ];
        assert_eq!(seen, expected);
        assert!(findings.iter().all(|finding| finding.level == Level::Ok));
    }

    #[test]
    fn a_gpu_without_cudnn_trains_slower() {
        let missing = "`libcudnn.so` was not found, which attends: install it";
        let mut machine = machine();
        machine.cudnn = Library {
            version: None,
            path: None,
            missing: Some(missing.to_owned()),
            ..found("cuDNN")
        };
        let expected = Finding::warn(
            "cuDNN",
            "`libcudnn.so` was not found, which attends",
            "for faster training: install it",
        );
        assert_eq!(shown(&machine)[4], expected);
    }

    #[test]
    fn what_a_gpu_lacks_is_a_warning_with_a_fix() {
        let missing = "`libnvrtc.so` was not found, which compiles the kernels: install it";
        let mut machine = machine();
        machine.libraries[1] = Library {
            version: None,
            path: None,
            missing: Some(missing.to_owned()),
            ..found("NVRTC")
        };
        machine.auto = Err(missing.to_owned());
        machine.gpus = Some(Err("no device".to_owned()));
        let findings = shown(&machine);
        assert_eq!(
            findings[2],
            Finding::warn(
                "NVRTC",
                "`libnvrtc.so` was not found, which compiles the kernels",
                "for GPUs only: install it"
            )
        );
        assert_eq!(
            (findings[4].level, &*findings[4].seen),
            (Level::Warn, "no device")
        );
        let expected = "`--device auto` is the CPU (`libnvrtc.so` was not found, which compiles the kernels), `--dtype auto` \
                        bf16; q8 is faster, with other numbers";
        assert_eq!(findings[5].seen, expected);
        assert_eq!(findings[5].level, Level::Ok, "the CPU serves");
        let expected = "`--device auto` is the CPU (`libnvrtc.so` was not found, which compiles the kernels), in f32";
        assert_eq!(findings[6].seen, expected);
        assert_eq!(findings[6].level, Level::Ok, "the CPU trains");
    }

    /// Whatever this machine has: something serves, and nothing is a fault.
    #[tokio::test]
    async fn this_machine_serves() {
        let findings = findings().await;
        assert!(
            findings.iter().all(|finding| finding.level != Level::Fail),
            "{findings:?}"
        );
        let does: Vec<&str> = findings.iter().map(|finding| &*finding.what).collect();
        assert!(does.ends_with(&["model serving", "training"]), "{does:?}");
        for finding in &findings {
            assert_eq!(
                finding.level == Level::Ok,
                finding.fix.is_empty(),
                "{finding:?}"
            );
        }
    }
}
