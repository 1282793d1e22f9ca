//! The only integration test binary; each further one would link candle again.

mod bench;
mod commands;
mod file_systems;
mod generate;
mod house;
mod imports;
mod memory;
mod one_cpu;
mod plan;
mod ranks;
mod ranks_tcp;
mod tokenizer;
mod train;
mod transformer_parity;
mod words;
