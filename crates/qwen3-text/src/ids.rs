//! The ids with a meaning of their own.

/// Ids from here on to the model's vocabulary size (151,936) are padding: no text has them, and they must never be
/// sampled.
pub const VOCABULARY: u32 = 151_669;

/// Ends a document; also used for padding.
pub const END_OF_TEXT: u32 = 151_643;
/// Starts a turn.
pub const TURN_OPEN: u32 = 151_644;
/// Ends a turn: where generation stops.
pub const TURN_CLOSE: u32 = 151_645;
/// Starts a tool call.
pub const CALL_OPEN: u32 = 151_657;
/// Ends a tool call.
pub const CALL_CLOSE: u32 = 151_658;
/// Starts the reasoning of a turn.
pub const THOUGHT_OPEN: u32 = 151_667;
/// Ends the reasoning of a turn.
pub const THOUGHT_CLOSE: u32 = 151_668;

/// The first and the last of the tokens that transformers calls special, and leaves out of decoded answers. The
/// markers of tools and thoughts are not among them.
pub(crate) const SPECIAL: std::ops::RangeInclusive<u32> = END_OF_TEXT..=151_656;

/// The text of each id that byte pairs never make, in order of ids. A test holds it against the tokenizer file.
pub(crate) const CONTROL: [(u32, &str); 26] = [
    (END_OF_TEXT, "<|endoftext|>"),
    (TURN_OPEN, "<|im_start|>"),
    (TURN_CLOSE, "<|im_end|>"),
    (151_646, "<|object_ref_start|>"),
    (151_647, "<|object_ref_end|>"),
    (151_648, "<|box_start|>"),
    (151_649, "<|box_end|>"),
    (151_650, "<|quad_start|>"),
    (151_651, "<|quad_end|>"),
    (151_652, "<|vision_start|>"),
    (151_653, "<|vision_end|>"),
    (151_654, "<|vision_pad|>"),
    (151_655, "<|image_pad|>"),
    (151_656, "<|video_pad|>"),
    (CALL_OPEN, "<tool_call>"),
    (CALL_CLOSE, "</tool_call>"),
    (151_659, "<|fim_prefix|>"),
    (151_660, "<|fim_middle|>"),
    (151_661, "<|fim_suffix|>"),
    (151_662, "<|fim_pad|>"),
    (151_663, "<|repo_name|>"),
    (151_664, "<|file_sep|>"),
    (151_665, "<tool_response>"),
    (151_666, "</tool_response>"),
    (THOUGHT_OPEN, "<think>"),
    (THOUGHT_CLOSE, "</think>"),
];

/// The first control text in `text`: where it starts, its id, its spelling. None is the start of another.
pub(crate) fn find_control(text: &str) -> Option<(usize, u32, &'static str)> {
    text.match_indices('<').find_map(|(at, _)| {
        let (id, spelling) = control_at(&text[at..])?;
        Some((at, id, spelling))
    })
}

/// The control text that `text` starts with.
pub(crate) fn control_at(text: &str) -> Option<(u32, &'static str)> {
    let starts = |(_, spelling): &&(u32, &str)| text.starts_with(spelling);
    CONTROL.iter().find(starts).copied()
}
