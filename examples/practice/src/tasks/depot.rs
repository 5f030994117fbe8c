//! Tasks at the depot: each needs to know one thing that no page says.

use serde_json::json;

use super::kinds::{Task, Text};
use crate::depot::Parcel;
use crate::world::World;

/// Every parcel, to be found.
pub(super) fn finds(world: &World) -> Vec<Task> {
    all(world, Task::DepotFind)
}

/// Every parcel, one of whose codes is needed.
pub(super) fn codes(world: &World) -> Vec<Task> {
    all(world, Task::DepotCode)
}

/// Every parcel, to be signed for.
pub(super) fn signs(world: &World) -> Vec<Task> {
    all(world, Task::DepotSign)
}

fn all(world: &World, task: fn(Parcel) -> Task) -> Vec<Task> {
    world.depot.parcels.iter().cloned().map(task).collect()
}

pub(super) fn find(world: &World, parcel: &Parcel) -> Text {
    let Parcel {
        name,
        hall,
        crew,
        clerk,
        ..
    } = parcel;
    Text {
        prompt: json!(format!(
            "Find the parcel \"{name}\" in the depot at ${{site}}/depot. Its hall is {hall}, its crew is {crew}, its clerk \
             is {clerk}. Answer with its weight only."
        )),
        hints: format!("Parcels are found by {}.", world.depot.way.label()).into(),
        verify: json!({"answer": {"equals": parcel.weight.to_string()}}),
    }
}

pub(super) fn code(world: &World, parcel: &Parcel) -> Text {
    let (name, slug) = (&parcel.name, parcel.slug());
    Text {
        prompt: json!(format!(
            "Which number does the driver of the parcel \"{name}\" need? Open ${{site}}/depot/parcel/{slug} and answer with \
             the number only."
        )),
        hints: format!("Drivers need the {}.", world.depot.code.label()).into(),
        verify: json!({"answer": {"equals": parcel.code(world.depot.code).to_string()}}),
    }
}

pub(super) fn sign(world: &World, parcel: &Parcel) -> Text {
    let (name, slug) = (&parcel.name, parcel.slug());
    Text {
        prompt: json!(format!(
            "Sign for the parcel \"{name}\" at ${{site}}/depot/sign/{slug}. Answer with the receipt only."
        )),
        hints: format!("Signing is done with {}.", world.depot.sign.label()).into(),
        verify: json!({"answer": {"equals": parcel.receipt.to_string()}}),
    }
}
