// The query rows of a tile: which token and head each is, and which of them live.
#pragma once

#include "common/divisor.h"
#include "common/macros.h"

namespace broadhead {

// Rows of a tile when `rows_per_token` query heads of one KV head are packed: row = token * rows_per_token + head.
struct RowMap {
  int first_row;           // the tile's first row within the sequence and (KV) head
  Divisor rows_per_token;  // 1: not packed
  int end_row;             // past the tile's last live row of the sequence

  BROADHEAD_DEVICE int token(int row) const { return rows_per_token.quotient(first_row + row); }
};

// Where the rows of one (sequence, head) tile go.
struct OutputRows {
  RowMap rows;
  int head;  // KV head when packed, else query head

  BROADHEAD_DEVICE int query_head(int row) const {
    return head * rows.rows_per_token + rows.first_row + row - rows.token(row) * rows.rows_per_token;
  }
  BROADHEAD_DEVICE bool live(int row) const { return rows.first_row + row < rows.end_row; }
};

}  // namespace broadhead
