//! The page that goes with what was trained: what it is, how it is used, where it comes from. It says nothing that is not in
//! the version's record, so that the same version has the same page wherever and whenever it goes out.

use std::fmt::Write as _;

use espalier_core::adapter::{AdapterKind, AdapterVersion};
use espalier_core::spec::is_hub_repo;
use serde_json::Value;

/// What is in the folder that the page goes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An adapter, as PEFT has it.
    Adapter,
    /// A whole model.
    Model,
}

/// The page, as Markdown behind a header of YAML.
#[must_use]
pub fn card(version: &AdapterVersion, form: Form) -> String {
    let mut text = header(version, form);
    let title = format!("{} v{}", version.name, version.n);
    let base = &plain(&version.base.name);
    let what = match (form, version.kind) {
        (Form::Adapter, _) => format!("A LoRA adapter for `{base}`, for agents that use tools."),
        (Form::Model, AdapterKind::Lora) => format!(
            "`{base}` with a LoRA adapter added to its weights (`W + s·B·A` in 32 bits, rounded once to bfloat16), for \
             agents that use tools."
        ),
        (Form::Model, AdapterKind::Full) => {
            format!("`{base}`, trained further in all its weights, for agents that use tools.")
        }
    };
    // Writing into a `String` cannot fail.
    let _ = write!(
        text,
        "\n# {title}\n\n{what}\n\n## Use\n\n{}",
        usage(version, form)
    );
    text.push_str(&lineage(version));
    text
}

/// Text that ends neither a line nor a span of code.
fn plain(text: &str) -> String {
    text.replace('`', "'").replace(char::is_control, " ")
}

/// JSON's strings are YAML's too.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn header(version: &AdapterVersion, form: Form) -> String {
    let mut lines = vec!["---".to_owned()];
    // The hub links it, so that it has to be one of its repositories.
    if is_hub_repo(&version.base.name) {
        lines.push(format!("base_model: {}", quoted(&version.base.name)));
        let relation = match form {
            Form::Adapter => "adapter",
            Form::Model => "finetune",
        };
        lines.push(format!("base_model_relation: {relation}"));
    }
    let library = match form {
        Form::Adapter => "peft",
        Form::Model => "transformers",
    };
    lines.push(format!("library_name: {library}"));
    lines.push("pipeline_tag: text-generation".to_owned());
    if is_hub_repo(&version.dataset) {
        lines.push(format!("datasets:\n- {}", quoted(&version.dataset)));
    }
    lines.push("tags:\n- espalier\n- agent\n- tool-use".to_owned());
    if version.kind == AdapterKind::Lora {
        lines.push("- lora".to_owned());
    }
    lines.push("---\n".to_owned());
    lines.join("\n")
}

fn usage(version: &AdapterVersion, form: Form) -> String {
    let (base, name) = (&plain(&version.base.name), version.name.as_str());
    match form {
        Form::Adapter => format!(
            "```python\n\
             from peft import PeftModel\n\
             from transformers import AutoModelForCausalLM\n\n\
             model = AutoModelForCausalLM.from_pretrained({base}, dtype=\"bfloat16\")\n\
             model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n\
             ```\n\n\
             With vLLM: `vllm serve {plain} --enable-lora --lora-modules {name}=path/to/this/folder`. With Espalier: \
             `espalier-infer-worker --model {plain} --adapter {name}=path/to/this/folder`.\n",
            base = quoted(base),
            plain = base,
        ),
        Form::Model => {
            "It is loaded as its base is: `AutoModelForCausalLM.from_pretrained`, `vllm serve`, or \
                        `espalier-infer-worker --model`.\n"
                .to_owned()
        }
    }
}

fn lineage(version: &AdapterVersion) -> String {
    let mut rows = vec![("version", format!("{}@v{}", version.name, version.n))];
    let base = &version.base;
    let revision = base
        .revision
        .as_deref()
        .map(|revision| format!(" at `{revision}`"));
    let revision = revision.unwrap_or_default();
    rows.push(("base model", plain(&base.name) + &revision));
    if !base.sha256.is_empty() {
        rows.push(("base SHA-256", format!("`{}`", base.sha256)));
    }
    let training = &version.training;
    // What was made elsewhere came without these.
    if training.steps > 0 {
        rows.push(("trained by job", format!("`{}`", version.job)));
        rows.push(("trained on", format!("`{}`", version.dataset)));
        rows.push(("optimizer steps", training.steps.to_string()));
        rows.push(("published weights of step", training.best_step.to_string()));
        rows.push(("tokens", training.tokens.to_string()));
        rows.push(("supervised tokens", training.supervised_tokens.to_string()));
        rows.push(("last training loss", format!("{:.4}", training.loss)));
        if let Some(loss) = training.eval_loss {
            rows.push(("evaluation loss", format!("{loss:.4}")));
        }
        let minutes = training.wall_ms as f64 / 60_000.0;
        rows.push(("time", format!("{minutes:.1} min")));
        let agreement = training.agreement.as_ref();
        let difference = agreement.and_then(|agreement| agreement.difference());
        rows.extend(difference.map(|it| ("train/serve agreement", it.to_string())));
    }
    for file in &version.files {
        let name = file.path.rsplit('/').next().unwrap_or_default();
        if name.ends_with(".safetensors") {
            rows.push((
                "SHA-256 of trained weights",
                format!("`{}` {name}", file.sha256),
            ));
        }
    }
    let mut text = "\n## Where it comes from\n\n| | |\n|---|---|\n".to_owned();
    for (name, value) in rows {
        // A bar would end the cell, and a line the table.
        let value = value.replace('|', "\\|").replace(char::is_control, " ");
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text
}
