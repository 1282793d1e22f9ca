//! `vilg` trains and runs a bidirectional Chinese text↔image model (ERNIE-ViLG, arXiv 2112.15283).
//!
//! # Module map
//! Read from the lowest floor up. A file may use only its own floor or a lower one.
//!
//! | floor | modules | what |
//! | --- | --- | --- |
//! | 0 | [`error`] [`bounded_read`] [`report`] [`random`] [`runtime`] [`config`] | errors with hints and exit codes; bounded reads of small files; all output; keyed random numbers; threads, memory and devices; the configuration |
//! | 1 | [`ops`] [`dist`] | kernels that candle lacks or runs slowly, forward and backward; ranks and collectives |
//! | 2 | [`nn`] | layers: linear, norm, attention with sparse patterns and KV cache, convolution |
//! | 3 | [`text`] [`tokenizer`] [`data`] | WordPiece; image tokenizers; samples, shards, batches |
//! | 4 | [`model`] | the paper's generator: sequence layout, transformer, loss of both directions, end-to-end reconstruction, decoding; the image–text matcher |
//! | 5 | [`train`] [`generate`] [`eval`] [`run_report`] [`bench`](mod@bench) [`device_check`] [`bundle`] | training engine; generation; metrics; the HTML page of runs and metrics; benchmarks; devices compared with the CPU; model folders |
//! | 6 | [`serve`] [`cli`] | local servers and their pages; one short function per command |

#![allow(rustdoc::private_intra_doc_links, reason = "read these pages with --document-private-items")]

pub mod bench;
pub mod bounded_read;
pub mod bundle;
pub mod cli;
pub mod config;
pub mod data;
pub mod device_check;
pub mod dist;
pub mod error;
pub mod eval;
pub mod generate;
pub mod model;
pub mod nn;
pub mod ops;
pub mod random;
pub mod report;
pub mod run_report;
pub mod runtime;
pub mod serve;
pub mod text;
pub mod tokenizer;
pub mod train;
