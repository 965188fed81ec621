// Flattens the nested events of web pages into rows, with separate routes for views and orders.
import { plugin } from "shardmill";

import { campaignOf } from "./lib/campaign.js";

const visit = { at: "timestamptz", visitor: "text", path: "text", campaign: "text?" };

let ignored = [];

export const stage = plugin({
  name: "page-events",
  version: "0.1.0",
  accepts: ["application/json"],
  routes: {
    views: { format: "application/json", columns: { ...visit, referrer: "text?" } },
    orders: { format: "application/json", columns: { ...visit, sku: "text", cents: "bigint" } },
  },

  configure(config) {
    ignored = config.ignore_visitors ?? [];
  },

  record(record, out) {
    const { type, sent, visitor, page, order } = record.json();
    if (ignored.includes(visitor?.id)) return;
    const row = {
      at: new Date(sent).toISOString(),
      visitor: visitor.id,
      path: page.url.replace(/^https?:\/\/[^/]+/, "").split(/[?#]/, 1)[0] || "/",
      campaign: campaignOf(page.url) ?? null,
    };
    switch (type) {
      case "view":
        out.emit("views", { ...row, referrer: page.referrer ?? null });
        break;
      case "order":
        // One row for each line of the order, all with the visitor's key.
        for (const { sku, price, count } of order.lines) {
          out.emit("orders", { ...row, sku, cents: Math.round(price * 100) * count }, visitor.id);
        }
        break;
      default:
        out.reject(`unknown event type ${JSON.stringify(type)}: expected view or order`);
    }
  },
});
