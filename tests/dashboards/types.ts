// What our dashboards are, in Grafana's own types (npm: @grafana/schema).  The options and fields of each kind of panel
// are its plug-in's, so a misspelt option is an error.  The queries are not checked here: the type of a Prometheus query
// is not in that package, and a real Prometheus is asked every one of them in another test.
import type {
  Dashboard,
  FieldConfigSource,
  Panel,
} from '@grafana/schema';
import type * as BarGauge from './node_modules/@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as StateTimeline from './node_modules/@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as Stat from './node_modules/@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as Table from './node_modules/@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as TimeSeries from './node_modules/@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON holds the text of an enumeration's member, where TypeScript wants the member.
type Plain<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends (infer Item)[]
      ? Plain<Item>[]
      : { [Key in keyof T]: Plain<T[Key]> };

type Kind<Name extends string, Options, Fields> = Omit<Plain<Panel>, 'type' | 'options' | 'fieldConfig'> & {
  type: Name;
  options: Plain<Options>;
  fieldConfig: Plain<Omit<FieldConfigSource, 'defaults'>> & {
    defaults: Omit<Plain<FieldConfigSource['defaults']>, 'custom'> & { custom?: Plain<Fields> };
  };
};

export type OurPanel =
  | Kind<'timeseries', TimeSeries.Options, TimeSeries.FieldConfig>
  | Kind<'state-timeline', StateTimeline.Options, StateTimeline.FieldConfig>
  | Kind<'table', Table.Options, Table.FieldConfig>
  | Kind<'stat', Stat.Options, Record<string, never>>
  | Kind<'bargauge', BarGauge.Options, Record<string, never>>;

// `definition` is what Grafana's editor writes beside a query variable's query; the type does not have it.
type Variables = NonNullable<NonNullable<Dashboard['templating']>['list']>;
export type OurDashboard = Omit<Plain<Dashboard>, 'panels' | 'templating'> & {
  panels: OurPanel[];
  templating: { list: (Plain<Variables[number]> & { definition?: string })[] };
};
