use serde_json::json;

use super::*;

fn dense() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "rope_scaling": null,
        "max_position_embeddings": 40_960, "tie_word_embeddings": true, "attention_bias": false,
        "hidden_act": "silu", "sliding_window": null, "use_sliding_window": false,
    })
}

fn sparse() -> Value {
    let mut config = dense();
    let more = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true, "decoder_sparse_step": 1,
        "mlp_only_layers": [2], "tie_word_embeddings": false,
    });
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

#[test]
fn checkpoints_of_both_kinds_are_read() {
    let config = Config::parse(&dense().to_string()).unwrap();
    assert_eq!((config.real_vocab_size, config.head_dim), (151_669, 128));
    assert_eq!(
        config.rope,
        Rope {
            theta: 1e6,
            yarn: None
        }
    );
    assert!(config.tied && config.moe.is_none());
    let config = Config::parse(&sparse().to_string()).unwrap();
    assert!(!config.is_sparse(2) && config.is_sparse(3));
    let mut newer = sparse();
    newer["num_local_experts"] = newer["num_experts"].take();
    newer["rope_parameters"] = json!({"rope_theta": 1e6, "rope_type": "default"});
    newer["rope_theta"] = Value::Null;
    assert_eq!(Config::parse(&newer.to_string()).unwrap(), config);
}

#[test]
fn yarn_is_read_in_both_spellings() {
    for name in ["type", "rope_type"] {
        let mut config = dense();
        config["rope_scaling"] =
            json!({name: "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768});
        let config = Config::parse(&config.to_string()).unwrap();
        let yarn = config.rope.yarn.unwrap();
        assert_eq!((yarn.factor, yarn.original_positions), (4.0, 32_768));
        assert_eq!(config.max_positions, 131_072);
        assert!((yarn.attention_factor - 1.138_629_436).abs() < 1e-8);
    }
}

#[test]
fn bad_configs_are_refused_by_field_value_and_rule() {
    let cases = [
        (dense(), "model_type", json!("llama"), "\"llama\""),
        (dense(), "model_type", Value::Null, "got nothing"),
        (
            dense(),
            "architectures",
            json!(["Qwen3MoeForCausalLM"]),
            "Qwen3ForCausalLM",
        ),
        (dense(), "hidden_size", Value::Null, "got nothing"),
        (dense(), "hidden_size", json!(-4), "whole number"),
        (dense(), "num_hidden_layers", json!(0), "whole number"),
        (
            dense(),
            "num_key_value_heads",
            json!(3),
            "must divide num_attention_heads (16)",
        ),
        (dense(), "head_dim", json!(100), "multiple of 16"),
        (dense(), "rope_theta", json!(0), "above 0"),
        (dense(), "rope_theta", Value::Null, "got nothing"),
        (dense(), "attention_bias", json!(true), "must be false"),
        (dense(), "use_sliding_window", json!(true), "must be false"),
        (dense(), "hidden_act", json!("gelu"), "silu"),
        (
            dense(),
            "quantization_config",
            json!({"quant_method": "awq"}),
            "quantised",
        ),
        (
            sparse(),
            "num_experts_per_tok",
            json!(129),
            "at most the number of experts (128)",
        ),
        (
            sparse(),
            "num_local_experts",
            json!(64),
            "must equal num_experts (128)",
        ),
        (sparse(), "mlp_only_layers", json!([28]), "below 28"),
        (
            sparse(),
            "moe_intermediate_size",
            Value::Null,
            "got nothing",
        ),
        (dense(), "rms_norm_eps", json!("x"), "finite number"),
        (dense(), "num_hidden_layers", json!(1025), "1 to 1024"),
        (sparse(), "num_experts", json!(1 << 24), "1 to 1024"),
    ];
    for (mut config, field, value, says) in cases {
        config[field] = value;
        let error = Config::parse(&config.to_string()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("`{field}`")) && error.contains(says),
            "{error}"
        );
    }
    let mut config = dense();
    config["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.0});
    let error = Config::parse(&config.to_string()).unwrap_err().to_string();
    assert!(
        error.contains("`rope_type`") && error.contains("linear"),
        "{error}"
    );
    assert!(Config::parse("{").is_err());
}

#[test]
fn rows_beyond_the_tokenizer_are_padding_however_many_there_are() {
    for (rows, real) in [(151_936, 151_669), (151_680, 151_669), (512, 512)] {
        let mut config = dense();
        config["vocab_size"] = json!(rows);
        let config = Config::parse(&config.to_string()).unwrap();
        assert_eq!(config.real_vocab_size, real);
    }
}
