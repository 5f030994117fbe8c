//! From a graph to what runs: the first engine that cuDNN would take and whose results repeat.

#![expect(unsafe_code, reason = "plans run on memory by address")]

use std::ffi::c_void;

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t as Choice, cudnnBackendNumericalNote_t as Notes,
};

use super::descriptor::{Descriptor, Note, Object, Pointer};
use super::graph::{Graph, Tensor};
use super::{Cudnn, answer};
use crate::cuda::error::CudaError;

/// Engines that are looked at.
const ENGINES_MAX: usize = 8;
/// Notes of an engine that are read: more than there are.
const NOTES_MAX: usize = 64;

/// What runs a graph.
pub(super) struct Plan {
    plan: Descriptor,
    /// By id, where they lie when the plan runs.
    constants: Box<[(i64, f32)]>,
    /// Scratch memory that it must be given.
    pub(super) scratch_bytes: usize,
    /// What it is made of.
    _made_of: Vec<Descriptor>,
}

impl Plan {
    /// Finds kernels for `graph`; compiling them may take a second.
    pub(super) fn new(cudnn: &Cudnn, mut graph: Graph, what: &str) -> Result<Self, CudaError> {
        let constants = std::mem::take(&mut graph.constants).into();
        let operations: Vec<Object> = graph.operations.iter().map(Descriptor::object).collect();
        let operations = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, what)?
            .with(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &operations)?
            .with(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[cudnn.handle])?
            .finish()?;
        let chooser = Descriptor::new(
            Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR,
            format!("the choice of an engine of {what}"),
        )?
        .with(
            Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH,
            &[operations.object()],
        )?
        .with(
            Name::CUDNN_ATTR_ENGINEHEUR_MODE,
            &[Choice::CUDNN_HEUR_MODE_A],
        )?
        .finish()?;
        let mut refused = None;
        for engine in engines(&chooser, what)? {
            match repeats(&engine, what).and_then(|repeats| planned(&engine, what, repeats)) {
                Ok((plan, scratch_bytes)) => {
                    let mut made_of: Vec<Descriptor> = graph.into_parts().collect();
                    made_of.extend([operations, chooser, engine]);
                    return Ok(Self {
                        plan,
                        constants,
                        scratch_bytes,
                        _made_of: made_of,
                    });
                }
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or_else(|| unsupported(what, "no engine is for it")))
    }

    /// Launches it.
    ///
    /// # Safety
    /// `at` must name every tensor of the graph that memory has, by addresses of the device that live until what was
    /// launched has run, as long as their layouts say; `scratch` must have as many bytes as the plan wants.
    pub(super) unsafe fn run(
        &self,
        cudnn: &Cudnn,
        at: &[(Tensor, u64)],
        scratch: u64,
    ) -> Result<(), CudaError> {
        let constants = self.constants.iter().map(|(id, value)| {
            let value: *const f32 = value;
            (*id, Pointer(value.cast_mut().cast()))
        });
        let (ids, addresses): (Vec<i64>, Vec<Pointer>) = at
            .iter()
            .map(|(tensor, address)| (tensor.id(), Pointer(*address as *mut c_void)))
            .chain(constants)
            .unzip();
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, "addresses")?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &ids)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &addresses)?
            .with(
                Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                &[Pointer(scratch as *mut c_void)],
            )?
            .finish()?;
        // SAFETY: handle and descriptors live; the addresses are the caller's promise, and those of constants are read
        // before the call returns.
        let status = unsafe { sys::cudnnBackendExecute(cudnn.handle, self.plan.raw(), pack.raw()) };
        answer(status, || "run a plan".to_owned())
    }
}

fn unsupported(what: &str, said: &str) -> CudaError {
    let status = sys::cudnnStatus_t::CUDNN_STATUS_NOT_SUPPORTED;
    CudaError::Graph {
        tried: format!("plan {what}"),
        said: said.to_owned(),
        source: cudarc::cudnn::result::CudnnError(status),
    }
}

/// What cuDNN would take, the best first.
fn engines(chooser: &Descriptor, what: &str) -> Result<Vec<Descriptor>, CudaError> {
    let empty = || {
        let kind = Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR;
        Descriptor::new(kind, format!("an engine of {what}"))
    };
    let mut engines = (0..ENGINES_MAX)
        .map(|_| empty())
        .collect::<Result<Vec<_>, _>>()?;
    let mut objects: Vec<Object> = engines.iter().map(Descriptor::object).collect();
    // cuDNN fills as many of the descriptors as it has engines.
    let filled = chooser.read(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, &mut objects)?;
    engines.truncate(filled);
    Ok(engines)
}

/// Whether an engine gives the same bits each time.
fn repeats(engine: &Descriptor, what: &str) -> Result<bool, CudaError> {
    let kind = Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR;
    let inner = Descriptor::new(kind, format!("an engine of {what}"))?;
    engine.read(Name::CUDNN_ATTR_ENGINECFG_ENGINE, &mut [inner.object()])?;
    let mut notes = [Note(u32::MAX); NOTES_MAX];
    let count = inner.read(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, &mut notes)?;
    let differs = Note(Notes::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC as u32);
    Ok(!notes[..count.min(NOTES_MAX)].contains(&differs))
}

fn planned(
    engine: &Descriptor,
    what: &str,
    repeats: bool,
) -> Result<(Descriptor, usize), CudaError> {
    if !repeats {
        return Err(unsupported(
            what,
            "its results would differ from run to run",
        ));
    }
    let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, what)?
        .with(
            Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
            &[engine.object()],
        )?
        .finish()?;
    let mut bytes = [0i64];
    plan.read(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, &mut bytes)?;
    Ok((plan, usize::try_from(bytes[0]).unwrap_or(0)))
}
