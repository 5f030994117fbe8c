//! Boards of notices. A notice opens in a new tab and shows a word that its board does not.

use crate::page::{Block, Fact, Link, Page};
use crate::world::{Board, Notice, World, slug};

/// All boards.
pub fn index(world: &World) -> Page {
    let links = world
        .boards
        .iter()
        .map(|board| Link::new(board.name, format!("/notices/{}", board.name)))
        .collect();
    Page::new("Notices").with(Block::Links(links))
}

/// One board.
pub fn board(board: &Board) -> Page {
    let links = board
        .notices
        .iter()
        .map(|notice| Link {
            new_tab: true,
            ..Link::new(
                notice.name.clone(),
                format!("/notices/{}/{}", board.name, slug(&notice.name)),
            )
        })
        .collect();
    Page::new(format!("Board {}", board.name))
        .with(Block::Text("Each notice opens in a new tab.".into()))
        .with(Block::Links(links))
}

/// The notice of `board` at that address.
pub fn find<'a>(board: &'a Board, address: &str) -> Option<&'a Notice> {
    board
        .notices
        .iter()
        .find(|notice| slug(&notice.name) == address)
}

/// One notice.
pub fn notice(notice: &Notice) -> Page {
    Page::new(notice.name.clone()).with(Block::Facts(vec![Fact {
        name: "Word",
        value: notice.word.clone(),
        id: "word",
    }]))
}
