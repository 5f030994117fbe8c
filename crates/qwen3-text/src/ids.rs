//! The texts that byte pairs never make, and the ids with a meaning of their own.
//!
//! The texts are those of Qwen3, and every tokenizer here has all of them; which ids they have is the tokenizer's own.

/// Ids with a meaning of their own, as a [`Tokenizer`](crate::Tokenizer) gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// `<|endoftext|>` ends a document; also used for padding.
    pub end_of_text: u32,
    /// `<|im_start|>` starts a turn.
    pub turn_open: u32,
    /// `<|im_end|>` ends a turn: where generation stops.
    pub turn_close: u32,
    /// `<tool_call>` starts a tool call.
    pub call_open: u32,
    /// `</tool_call>` ends a tool call.
    pub call_close: u32,
    /// `<think>` starts the reasoning of a turn.
    pub thought_open: u32,
    /// `</think>` ends the reasoning of a turn.
    pub thought_close: u32,
}

/// How many control texts there are.
pub(crate) const CONTROLS: usize = 26;

/// The text of each id that byte pairs never make, in the order of Qwen3's ids. A test holds it against the tokenizer
/// file.
pub(crate) const CONTROL: [&str; CONTROLS] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
];

/// How many of them, from the first on, transformers calls special for Qwen3, and leaves out of decoded answers. The
/// markers of tools and thoughts are not among them.
pub(crate) const SPECIALS: usize = 14;

impl Ids {
    /// Those of a tokenizer that gives the texts of [`CONTROL`], in their order, these ids.
    pub(crate) fn of(controls: &[u32; CONTROLS]) -> Self {
        Self {
            end_of_text: controls[0],
            turn_open: controls[1],
            turn_close: controls[2],
            call_open: controls[14],
            call_close: controls[15],
            thought_open: controls[24],
            thought_close: controls[25],
        }
    }
}

/// The first control text in `text`: where it starts, its place in [`CONTROL`], its spelling. None is the start of
/// another.
pub(crate) fn find_control(text: &str) -> Option<(usize, usize, &'static str)> {
    text.match_indices('<').find_map(|(at, _)| {
        let (place, spelling) = control_at(&text[at..])?;
        Some((at, place, spelling))
    })
}

/// The control text that `text` starts with, and its place in [`CONTROL`].
pub(crate) fn control_at(text: &str) -> Option<(usize, &'static str)> {
    let place = CONTROL
        .iter()
        .position(|control| text.starts_with(control))?;
    Some((place, CONTROL[place]))
}
