//! The report as one page: the pipeline's own head, then what stands in the comparison's page. As that one, it fetches
//! nothing and runs nothing, and forbids itself both.

use std::fmt::Write;

use espalier_core::compare::PAGE_FILE;
use espalier_core::compare::markup::{POLICY, STYLE, escaped, html_table};

use super::{Story, file};

/// The report.
pub(super) fn html(story: &Story<'_>) -> String {
    let title = format!("Pipeline {}", story.plan.pipeline);
    let mut out = String::new();
    // Writing into a `String` cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\
         <h1>{title}</h1><p class=\"gate\">{}</p>",
        escaped(&story.verdict()),
        title = escaped(&title),
    );
    let sections = [
        ("Rounds", story.rounds_table()),
        ("Steps", story.steps_table()),
        ("Train and serve", story.agreement_table()),
        ("Difficulty of the training tasks", story.difficulty_table()),
    ];
    for (title, table) in sections.iter().filter(|(_, table)| !table.rows.is_empty()) {
        let _ = write!(out, "<h2>{title}</h2>{}", html_table(table));
    }
    if let Some(why) = &story.unread {
        let _ = write!(
            out,
            "<p>The comparison cannot be shown: {}</p>",
            escaped(why)
        );
    }
    if let Some([tree, counted]) = story.lineage() {
        let (tree, counted) = (escaped(&tree), escaped(&counted));
        let _ = write!(out, "<h2>Lineage</h2><p>{counted}:</p><pre>{tree}</pre>");
    }
    if let Some(said) = story.compared_in() {
        let _ = write!(out, "<p>{said}</p>");
    }
    if let Some((_, read)) = &story.compared {
        match file(read, PAGE_FILE).as_deref().and_then(body) {
            Some(body) => out.push_str(body),
            None => out.push_str("<p>The comparison's page has no body.</p>"),
        }
    }
    out.push_str("</body></html>\n");
    out
}

/// What stands in a page. Its digest is that of its manifest, and where it stands now is as strict as where it came from.
fn body(page: &str) -> Option<&str> {
    let (_, rest) = page.split_once("<body>")?;
    let (body, _) = rest.rsplit_once("</body>")?;
    Some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_taken_without_its_frame() {
        assert_eq!(body("<html><body><p>x</p></body></html>"), Some("<p>x</p>"));
        assert_eq!(body("<html>"), None);
    }
}
