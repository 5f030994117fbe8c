//! W3C trace context: the text that ties the spans of two processes together.
//!
//! Format: W3C Trace Context, level 1, header `traceparent`, version 00.

use std::fmt;
use std::str::FromStr;

use espalier_core::error::FieldError;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A valid `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    trace_id: TraceId,
    span_id: SpanId,
    sampled: bool,
}

impl TraceParent {
    /// The id of the trace, in 32 hex digits: what a stored trace is looked up by.
    pub fn trace_id(&self) -> String {
        self.trace_id.to_string()
    }

    fn of(context: &SpanContext) -> Option<Self> {
        context.is_valid().then(|| Self {
            trace_id: context.trace_id(),
            span_id: context.span_id(),
            sampled: context.is_sampled(),
        })
    }

    fn remote(self) -> SpanContext {
        let flags = if self.sampled {
            TraceFlags::SAMPLED
        } else {
            TraceFlags::default()
        };
        let state = TraceState::default();
        SpanContext::new(self.trace_id, self.span_id, flags, true, state)
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = u8::from(self.sampled);
        write!(f, "00-{}-{}-{flags:02x}", self.trace_id, self.span_id)
    }
}

impl FromStr for TraceParent {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        parse(text).ok_or_else(|| {
            let rule = "must be a W3C traceparent of version 00, such as \
                        00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            FieldError::new("traceparent", text, rule)
        })
    }
}

fn parse(text: &str) -> Option<TraceParent> {
    let mut parts = text.split('-');
    let mut field = |digits: usize| {
        let part = parts.next()?;
        let lowercase_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (part.len() == digits && part.bytes().all(lowercase_hex)).then_some(part)
    };
    let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
    if version != "00" || parts.next().is_some() {
        return None;
    }
    let parent = TraceParent {
        trace_id: TraceId::from_hex(trace).ok()?,
        span_id: SpanId::from_hex(span).ok()?,
        sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
    };
    // All zeros is the standard's "no trace" and "no span".
    parent.remote().is_valid().then_some(parent)
}

/// The current span, as a job spec or a request carries it. None where no traces are exported.
pub fn inject_traceparent() -> Option<TraceParent> {
    let context = Span::current().context();
    TraceParent::of(context.span().span_context())
}

/// Ties `span` to work that caused it but does not wait for it: an attempt to its submission.
pub fn link_to(span: &Span, cause: TraceParent) {
    span.add_link(cause.remote());
}

/// Makes `span` a child of the caller's span: the server side of a request. Must come before the span is entered.
pub fn continue_from(span: &Span, caller: TraceParent) {
    let context = opentelemetry::Context::new().with_remote_span_context(caller.remote());
    // Fails only where no traces are exported or the span is disabled; then there is nothing to tie.
    let _ = span.set_parent(context);
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_reads_back_what_it_writes() {
        let parent: TraceParent = GOOD.parse().unwrap();
        assert_eq!(parent.to_string(), GOOD);
        assert_eq!(parent.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        let unsampled: TraceParent = GOOD.replace("-01", "-00").parse().unwrap();
        assert!(unsampled.to_string().ends_with("-00"));
    }

    #[test]
    fn what_is_no_traceparent_is_refused() {
        let zero_trace = format!("00-{}-b7ad6b7169203331-01", "0".repeat(32));
        let zero_span = format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", "0".repeat(16));
        let upper = GOOD.to_uppercase();
        let longer = format!("{GOOD}-x");
        for bad in [
            "",
            "00",
            &zero_trace,
            &zero_span,
            &upper,
            &longer,
            &GOOD[1..],
            &GOOD.replace("00-", "ff-"),
        ] {
            let error = bad.parse::<TraceParent>().unwrap_err();
            assert_eq!(error.field, "traceparent", "{bad}");
        }
    }

    #[test]
    fn without_exported_traces_there_is_none() {
        assert_eq!(inject_traceparent(), None);
        link_to(&Span::none(), GOOD.parse().unwrap());
        continue_from(&Span::none(), GOOD.parse().unwrap());
    }
}
