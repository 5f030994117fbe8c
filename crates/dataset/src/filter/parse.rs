//! Text to expression: words, operators and brackets, then `or` over `and` over `not`.

use super::{Expression, FilterError, NumberField, NumberIs, TEXT_BYTES_MAX, TextField, TextIs};

/// Deepest nesting of `not` and brackets.
const DEPTH_MAX: usize = 64;
const FIELDS: &str = "a field (reward, solved, turns, messages, tool_errors, tokens, wall_s, id, model, stop, task_id, \
                      task_kind, split, label.NAME)";

#[derive(Clone, Debug, PartialEq)]
struct Token {
    column: usize,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Word(String),
    Quoted(String),
    /// An operator or a bracket.
    Sign(&'static str),
}

const SIGNS: [&str; 10] = ["==", "!=", "<=", ">=", "=", "<", ">", "~", "(", ")"];

/// Parses a whole expression.
pub(super) fn expression(text: &str) -> Result<Expression, FilterError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(FilterError {
            column: 1,
            rule: format!("at most {TEXT_BYTES_MAX} bytes"),
            got: text.len().to_string(),
        });
    }
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        end: text.chars().count() + 1,
    };
    let parsed = parser.any(0)?;
    match parser.peek() {
        None => Ok(parsed),
        Some(_) => Err(parser.refuse("`and`, `or` or its end")),
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, FilterError> {
    let mut tokens = Vec::new();
    let (mut rest, mut column) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let (len, kind) = if first.is_whitespace() {
            (first.len_utf8(), None)
        } else if let Some(sign) = SIGNS.into_iter().find(|sign| rest.starts_with(sign)) {
            (sign.len(), Some(Kind::Sign(sign)))
        } else if matches!(first, '"' | '\'') {
            let closed = rest[1..].find(first).ok_or_else(|| FilterError {
                column,
                rule: "a closing quote to the one".to_owned(),
                got: shown(rest),
            })?;
            (closed + 2, Some(Kind::Quoted(rest[1..=closed].to_owned())))
        } else {
            let ends = |c: char| c.is_whitespace() || "=!<>~()\"'".contains(c);
            let len = rest.find(ends).filter(|len| *len > 0).unwrap_or(rest.len());
            (len, Some(Kind::Word(rest[..len].to_owned())))
        };
        tokens.extend(kind.map(|kind| Token { column, kind }));
        column += rest[..len].chars().count();
        rest = &rest[len..];
    }
    Ok(tokens)
}

fn shown(text: &str) -> String {
    let start: String = text.chars().take(40).collect();
    format!("`{start}`")
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    /// The column after the last character.
    end: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Kind> {
        self.tokens.get(self.at).map(|token| &token.kind)
    }

    fn refuse(&self, rule: &str) -> FilterError {
        let token = self.tokens.get(self.at);
        FilterError {
            column: token.map_or(self.end, |token| token.column),
            rule: rule.to_owned(),
            got: match token.map(|token| &token.kind) {
                None => "its end".to_owned(),
                Some(Kind::Word(text) | Kind::Quoted(text)) => shown(text),
                Some(Kind::Sign(sign)) => shown(sign),
            },
        }
    }

    /// Takes the next token if it is this word.
    fn word(&mut self, word: &str) -> bool {
        let is_it = matches!(self.peek(), Some(Kind::Word(found)) if found == word);
        self.at += usize::from(is_it);
        is_it
    }

    fn any(&mut self, depth: usize) -> Result<Expression, FilterError> {
        let mut parts = vec![self.all(depth)?];
        while self.word("or") {
            parts.push(self.all(depth)?);
        }
        Ok(joined(parts, Expression::Any))
    }

    fn all(&mut self, depth: usize) -> Result<Expression, FilterError> {
        let mut parts = vec![self.one(depth)?];
        while self.word("and") {
            parts.push(self.one(depth)?);
        }
        Ok(joined(parts, Expression::All))
    }

    fn one(&mut self, depth: usize) -> Result<Expression, FilterError> {
        if depth > DEPTH_MAX {
            return Err(self.refuse(&format!("at most {DEPTH_MAX} levels")));
        }
        if self.word("not") {
            return Ok(Expression::Not(Box::new(self.one(depth + 1)?)));
        }
        if self.peek() != Some(&Kind::Sign("(")) {
            return self.comparison();
        }
        self.at += 1;
        let inner = self.any(depth + 1)?;
        if self.peek() != Some(&Kind::Sign(")")) {
            return Err(self.refuse("`and`, `or` or `)`"));
        }
        self.at += 1;
        Ok(inner)
    }

    fn comparison(&mut self) -> Result<Expression, FilterError> {
        let Some(Kind::Word(name)) = self.peek().cloned() else {
            return Err(self.refuse(FIELDS));
        };
        if name == "solved" {
            self.at += 1;
            return Ok(Expression::Solved);
        }
        if let Some(field) = number_field(&name) {
            self.at += 1;
            let is = self.sign(number_is, "one of =, !=, <, <=, >, >=")?;
            let number = match self.peek() {
                Some(Kind::Word(word)) => word.parse().ok().filter(|n: &f64| n.is_finite()),
                _ => None,
            };
            let number = number.ok_or_else(|| self.refuse("a number"))?;
            self.at += 1;
            return Ok(Expression::Number(field, is, number));
        }
        let field = text_field(&name).ok_or_else(|| self.refuse(FIELDS))?;
        self.at += 1;
        let is = self.sign(text_is, "one of =, !=, ~")?;
        let (Some(Kind::Word(text)) | Some(Kind::Quoted(text))) = self.peek().cloned() else {
            return Err(self.refuse("a text"));
        };
        self.at += 1;
        Ok(Expression::Text(field, is, text))
    }

    fn sign<T>(&mut self, of: fn(&str) -> Option<T>, rule: &str) -> Result<T, FilterError> {
        let found = match self.peek() {
            Some(Kind::Sign(sign)) => of(sign),
            _ => None,
        };
        let found = found.ok_or_else(|| self.refuse(rule))?;
        self.at += 1;
        Ok(found)
    }
}

fn joined(mut parts: Vec<Expression>, join: fn(Vec<Expression>) -> Expression) -> Expression {
    match parts.pop() {
        Some(only) if parts.is_empty() => only,
        last => {
            parts.extend(last);
            join(parts)
        }
    }
}

fn number_field(name: &str) -> Option<NumberField> {
    Some(match name {
        "reward" => NumberField::Reward,
        "turns" => NumberField::Turns,
        "messages" => NumberField::Messages,
        "tool_errors" => NumberField::ToolErrors,
        "tokens" => NumberField::Tokens,
        "wall_s" => NumberField::WallS,
        _ => return None,
    })
}

fn text_field(name: &str) -> Option<TextField> {
    Some(match name {
        "id" => TextField::Id,
        "model" => TextField::Model,
        "stop" => TextField::Stop,
        "task_id" => TextField::TaskId,
        "task_kind" => TextField::TaskKind,
        "split" => TextField::Split,
        _ => {
            let label = name.strip_prefix("label.")?;
            TextField::Label(Some(label).filter(|label| !label.is_empty())?.to_owned())
        }
    })
}

fn number_is(sign: &str) -> Option<NumberIs> {
    Some(match sign {
        "=" | "==" => NumberIs::Equal,
        "!=" => NumberIs::Other,
        "<" => NumberIs::Below,
        "<=" => NumberIs::AtMost,
        ">" => NumberIs::Above,
        ">=" => NumberIs::AtLeast,
        _ => return None,
    })
}

fn text_is(sign: &str) -> Option<TextIs> {
    Some(match sign {
        "=" | "==" => TextIs::Equal,
        "!=" => TextIs::Other,
        "~" => TextIs::Holding,
        _ => return None,
    })
}
