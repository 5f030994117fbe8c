//! The practice site: a small real web application that is a pure function of a seed, and tasks on it whose answers
//! are known.
//!
//! It is a place to try, test and later train agents without leaving the machine; it is no copy of any real shop.
//! `espalier practice` serves it and writes its tasks; the tests drive real browsers through it. Three layers, each
//! knowing only the one before: [`world`] (what is true), [`pages`] (what a page says, as a [`page::Page`]) and
//! [`html`] (how it is written); [`site`] puts them behind HTTP and [`tasks`] asks the world for the right answers.

pub mod depot;
pub mod draw;
pub mod html;
pub mod page;
pub mod pages;
pub mod route;
pub mod sessions;
pub mod site;
pub mod tasks;
pub mod teacher;
pub mod twin;
mod words;
pub mod world;
