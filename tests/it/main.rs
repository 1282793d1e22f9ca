//! The one integration binary (each further one would link candle again).

mod bench;
mod commands;
mod generate;
mod house;
mod imports;
mod memory;
mod plan;
mod ranks;
mod ranks_tcp;
mod tokenizer;
mod train;
mod transformer_parity;
