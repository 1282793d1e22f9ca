//! `vilg` trains and runs a bidirectional Chinese text↔image model (ERNIE-ViLG, arXiv 2112.15283).
//!
//! # The map
//! Read from the bottom floor up; a file uses only its own floor or a lower one.
//!
//! | floor | modules | what |
//! | --- | --- | --- |
//! | 0 | [`error`] [`files`] [`report`] [`random`] [`runtime`] [`config`] | hints and exit codes; bounded reading of small files; the only printer; keyed random numbers; threads, memory and devices; the configuration |
//! | 1 | [`ops`] [`dist`] | maths that candle lacks or does slowly, forward and backward; ranks and their collectives |
//! | 2 | [`nn`] | layers: linear, norm, attention with its patterns and cache, conv blocks |
//! | 3 | [`text`] [`tokenizer`] [`data`] | WordPiece; the image tokenizer; samples, shards, batches |
//! | 4 | [`model`] | the paper: sequence layout, transformer, two-way loss |
//! | 5 | [`train`] [`generate`] [`eval`] [`bench`](mod@bench) [`bundle`] | the engine; decoding; measures; speed; model folders |
//! | 6 | [`cli`] | one short function a command |

#![allow(rustdoc::private_intra_doc_links, reason = "these pages are for who reads the code: --document-private-items")]

pub mod bench;
pub mod bundle;
pub mod cli;
pub mod config;
pub mod data;
pub mod dist;
pub mod error;
pub mod eval;
pub mod files;
pub mod generate;
pub mod model;
pub mod nn;
pub mod ops;
pub mod random;
pub mod report;
pub mod runtime;
pub mod text;
pub mod tokenizer;
pub mod train;
